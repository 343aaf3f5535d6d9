"""The tokenizer as the project needs it, prompts as text, and how templates set an answer, against the templates."""

from __future__ import annotations

import json
from itertools import product
from pathlib import Path

import pytest
import trl
from tokenizers import processors
from transformers import AutoTokenizer, ByT5Tokenizer

from templates import KINDS, SHAPES, TOKENS, in_parts, with_template
from tiny import tiny_model, tiny_tokenizer
from zopro.errors import InputError
from zopro.rewards.sequences import Sequences
from zopro.text import chat
from zopro.text.chat import lost_message, render_answered, render_prompt, turn_of
from zopro.text.frame import check_vocabulary, declared_stops, frame_of, plain_frame
from zopro.text.tokenizer import load_tokenizer

CHAT = [{"role": "user", "content": "a cup of tea, please"}]
LONG = [
    {"role": "user", "content": "two cups and a cake"},
    {"role": "assistant", "content": "no cake is left"},
    {"role": "user", "content": "thank you\n\nthe tea, then"},
]
MESSAGES = {"one turn": CHAT, "several turns": LONG, "system": [{"role": "system", "content": "be kind"}, *CHAT]}
ANSWER = "thank you, the tea\nwas good."
TOOL = {"type": "function", "function": {"name": "brew", "parameters": {"type": "object"}}}
BARE = "{% for m in messages %}[{{ m['content'] }}]{% endfor %}"


def test_tokenizer_without_pad_token_or_template(tmp_path):
    bare = tiny_tokenizer()
    bare.pad_token = None
    bare.save_pretrained(tmp_path / "bare")
    loaded = load_tokenizer(str(tmp_path / "bare"))
    assert loaded.pad_token_id == loaded.eos_token_id == 2
    assert loaded.padding_side == "left"
    prompt = render_prompt(loaded, CHAT)
    assert prompt == "<bos><|im_start|>user\na cup of tea, please<|im_end|>\n<|im_start|>assistant\n"
    assert frame_of(loaded) == plain_frame(loaded)  # a template of ours, whose turn end the model has never seen
    tiny_tokenizer().save_pretrained(tmp_path / "padded")
    assert load_tokenizer(str(tmp_path / "padded")).pad_token_id == 0
    with pytest.raises(InputError, match=r"model: .*absent"):
        load_tokenizer(str(tmp_path / "absent"))


def test_a_tokenizer_without_eos_is_refused(tmp_path):
    bare = tiny_tokenizer()
    bare.eos_token = None
    bare.save_pretrained(tmp_path)
    with pytest.raises(InputError, match="EOS"):
        load_tokenizer(str(tmp_path))


@pytest.mark.parametrize(
    ("adds", "template"),
    [
        *product([True, False], [None, f"{{{{ bos_token }}}}{BARE}"]),
        (True, BARE),
        (True, {"default": BARE, "tool_use": BARE}),
        (True, {"default": BARE, "tool_use": f"{{{{ bos_token }}}}{BARE}"}),
    ],
)
def test_encoding_a_rendered_prompt_gives_bos_once(adds, template, tmp_path):
    tokenizer = tiny_tokenizer()
    if adds:
        tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
            single="<bos> $A", pair="<bos> $A $B", special_tokens=[("<bos>", 1)]
        )
    tokenizer.chat_template = template
    tokenizer.save_pretrained(tmp_path)
    loaded = load_tokenizer(str(tmp_path))
    ids = loaded(render_prompt(loaded, CHAT))["input_ids"]
    assert ids[0] == 1
    assert ids.count(1) == 1
    published = load_tokenizer(str(tmp_path), as_published=True)  # whose chats are encoded without adding anything
    for tools in (None, [TOOL])[: 1 + isinstance(template, dict)]:
        found = published.apply_chat_template(CHAT, tools=tools, add_generation_prompt=True)["input_ids"]
        assert found == ids


@pytest.mark.parametrize("bos", [True, False])
def test_a_tokenizer_that_ends_every_text_with_eos_no_longer_does(bos, tmp_path):
    tokenizer = with_template(SHAPES["llama 3"].template)
    start = ["<bos>"] if bos else []
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single=[*start, "$A", "<eos>"], pair=[*start, "$A", "$B", "<eos>"], special_tokens=[("<bos>", 1), ("<eos>", 2)]
    )
    tokenizer.save_pretrained(tmp_path / "before")
    assert AutoTokenizer.from_pretrained(tmp_path / "before")("tea")["input_ids"][-1] == 2
    loaded = load_tokenizer(str(tmp_path / "before"))
    expected = tokenizer.apply_chat_template(CHAT, add_generation_prompt=True)["input_ids"]
    assert loaded(render_prompt(loaded, CHAT))["input_ids"] == expected
    published = load_tokenizer(str(tmp_path / "before"), as_published=True)  # what an exported policy comes with
    assert published("tea")["input_ids"] == tokenizer("tea")["input_ids"]


def test_a_tokenizer_that_cannot_be_kept_from_it_is_refused(tmp_path):
    ByT5Tokenizer().save_pretrained(tmp_path)
    with pytest.raises(InputError, match=r"must not end every prompt with </s>"):
        load_tokenizer(str(tmp_path))


def test_a_template_kept_for_a_processor_is_the_models_own(tmp_path):
    tiny_tokenizer().save_pretrained(tmp_path)
    template = SHAPES["parts, text as nothing"].template
    (tmp_path / "chat_template.json").write_text(json.dumps({"chat_template": template}))
    assert load_tokenizer(str(tmp_path)).chat_template == template


@pytest.mark.parametrize("name", SHAPES)
@pytest.mark.parametrize("pieces", KINDS)
def test_token_ids_are_the_templates_own(name, pieces, tmp_path):
    with_template(SHAPES[name].template, pieces).save_pretrained(tmp_path)
    tokenizer = load_tokenizer(str(tmp_path))
    for kind, messages in MESSAGES.items():
        for answer in (ANSWER, f"\n{ANSWER} \n"):  # which some templates strip
            check_token_ids(tokenizer, SHAPES[name], name, kind, messages, answer)


def check_token_ids(tokenizer, shape, name, kind, messages, answer):
    declared = [tokenizer.convert_tokens_to_ids(token) for token in shape.declared]
    frame = frame_of(tokenizer, declared)
    assert (frame.opening, tokenizer.decode(list(frame.ending)).strip()) == (shape.opening, shape.ending.strip())
    assert frame.stops == {2, *declared, frame.stop}
    try:
        prompt = render_prompt(tokenizer, messages)
    except InputError as error:
        assert kind == "system" and not shape.system and "refuses messages with roles ['system', 'user']" in str(error)
        return
    if kind == "system" and not shape.system:
        assert lost_message(messages, prompt) == "system"
        return
    assert lost_message(messages, prompt) is None
    (ours,), cut = Sequences(tokenizer, 512, frame).from_text([prompt], [answer])

    whole = [*messages, {"role": "assistant", "content": answer}]
    if name in ("ended by the next speaker", "a last turn left open"):
        whole.append({"role": "user", "content": "x"})
    asked, theirs = (
        tokenizer.apply_chat_template(
            in_parts(chat) if shape.parts else chat, add_generation_prompt=asks, **shape.options
        )["input_ids"]
        for chat, asks in ((messages, True), (whole, False))
    )
    if tokenizer(prompt)["input_ids"] != asked:  # a template without BOS, on a tokenizer that begins every text with it
        assert "<bos>" not in shape.template and ours.pop(0) == 1 and tokenizer(prompt)["input_ids"] == [1, *asked]
    assert cut == 0
    if name == "no end at all":
        assert ours[:-1] == theirs[: len(ours) - 1] and ours[-1] == 2
    else:
        assert ours == theirs[: len(ours)]
    assert render_answered(tokenizer, messages, answer).startswith(prompt + frame.write(answer))


@pytest.mark.parametrize(
    ("template", "reason"),
    [
        ("{% for m in messages %}{{ m.role }}\n{% endfor %}", "renders the text of a message as nothing"),
        ("{% for m in messages %}{{ m.content | upper }}\n{% endfor %}", "renders the text of a message as nothing"),
        ("{{ raise_exception('not today') }}", "refuses messages with roles ['user']: not today"),
        ("{% for m in", "refuses messages with roles ['user']"),
        (
            "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}{% endfor %}"
            "{% if add_generation_prompt %}<|assistant|><think>\n{% endif %}",
            "asks for an answer with '<think>\\n', which answered turns do not have",
        ),
    ],
)
def test_a_template_without_a_place_for_the_answer_is_one_line(template, reason):
    with pytest.raises(InputError) as error:
        frame_of(with_template(template))
    assert str(error.value).startswith("model: the chat template ") and reason in str(error.value)
    assert "\n" not in str(error.value)


def test_every_template_that_trl_ships_is_right_or_refused():
    folder = Path(trl.__file__).parent / "chat_templates"
    names = [path.name for path in sorted(folder.glob("*.jinja")) if "_training" not in path.name]
    refused = []
    for name in names:
        tokenizer = with_template((folder / name).read_text("utf-8"))
        try:
            frame = frame_of(tokenizer)
        except InputError:
            refused.append(name)
            continue
        turn = turn_of(tokenizer)
        prompt = render_prompt(tokenizer, LONG)
        asked = tokenizer.apply_chat_template(
            in_parts(LONG) if turn.parts else LONG, add_generation_prompt=True, tokenize=False, **turn.options
        )
        assert prompt == asked, name
        for answer in (ANSWER, f"\n{ANSWER} \n"):
            whole = [*LONG, {"role": "assistant", "content": answer}]
            chat = in_parts(whole) if turn.parts else whole
            theirs = tokenizer.apply_chat_template(chat, tokenize=False, **turn.options)
            assert theirs.startswith(prompt + frame.write(answer)), name
    assert refused == [name for name in names if name.startswith("deepseek")]  # open a tag that the answer lacks


def test_templates_of_one_tokenizer_are_told_apart():
    tokenizer = with_template(SHAPES["llama 3"].template)
    assert frame_of(tokenizer).stop == tokenizer.convert_tokens_to_ids("<|eot_id|>")
    tokenizer.chat_template = SHAPES["chatml"].template
    assert frame_of(tokenizer).stop == tokenizer.convert_tokens_to_ids("<|im_end|>")


def test_messages_and_tools_reach_the_template_as_they_are():
    template = (
        "{% if tools %}{{ tools | tojson }}{% endif %}{% for m in messages %}<|{{ m.role }}|>{{ m.content }}"
        "{% for call in m.tool_calls %}{{ call.function | tojson }}{% endfor %}{{ m.name }}{% endfor %}"
        "{% if add_generation_prompt %}<|assistant|>{% endif %}"
    )
    tokenizer = with_template(template)
    call = {"type": "function", "function": {"name": "brew", "arguments": {"cups": 2}}}
    messages = [
        *CHAT,
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "name": "brew", "content": "done"},
    ]
    text = render_prompt(tokenizer, messages, [TOOL])
    assert text == tokenizer.apply_chat_template(messages, tools=[TOOL], add_generation_prompt=True, tokenize=False)
    assert '"parameters"' in text and '"cups": 2' in text and lost_message(messages, text) is None


def test_any_declared_stop_ends_an_answer():
    tokenizer = tiny_tokenizer()
    model = tiny_model("llama", tokenizer)
    for declared, expected in ((None, [2]), (7, [2, 7]), ([2, 9, 7], [2, 7, 9])):
        model.generation_config.eos_token_id = declared
        assert sorted(frame_of(tokenizer, declared_stops(model)).stops) == expected


def test_an_end_that_is_no_token_is_written_out_before_eos():
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = SHAPES["chatml"].template  # <|im_end|> is several tokens here
    frame = frame_of(tokenizer)
    assert frame.ending == (*tokenizer("<|im_end|>")["input_ids"], 2) and frame.stops == {2}
    assert frame.read([*tokenizer("a cake<|im_end|>")["input_ids"], 2]) == "a cake"


def test_white_space_among_the_added_tokens_ends_no_turn():
    tokenizer = with_template(SHAPES["no end at all"].template)
    tokenizer.add_tokens(["\n", "\u2581\u2581"])
    assert frame_of(tokenizer).ending == (2,)


@pytest.mark.parametrize("name", SHAPES)
@pytest.mark.parametrize("pieces", KINDS)
def test_an_answer_is_read_back_whichever_token_ended_it(name, pieces):
    shape = SHAPES[name]
    tokenizer = with_template(shape.template, pieces)
    frame = frame_of(tokenizer, [tokenizer.convert_tokens_to_ids(token) for token in shape.declared])
    alone, written = (tokenizer(text)["input_ids"] for text in ("<|user|>", "<|user|>" + frame.write(ANSWER)))
    written = written[len(alone) :]
    endings = [list(frame.ending), *([*frame.ending[:-1], stop] for stop in frame.stops), []]
    for ending in endings:
        assert frame.read([*written, *ending]) == ANSWER
        assert frame.read([*written, *ending, 0, 0] if ending else written) == ANSWER
    sequences = Sequences(tokenizer, 512, frame)
    expected = sequences.from_text(["<|user|>"], [ANSWER])[0] * len(endings)
    assert sequences.from_ids([alone] * len(endings), [[*written, *ending] for ending in endings]) == expected


def test_an_answer_that_thinks_keeps_its_own_opening():
    tokenizer = with_template(SHAPES["reasoning, empty where there is none"].template)
    frame, own = frame_of(tokenizer), "<think>\nmilk?\n</think>\n\nno milk"
    assert frame.write(own) == own
    assert frame.read([*tokenizer(own)["input_ids"], frame.stop]) == own
    channels = frame_of(with_template(SHAPES["channels"].template))
    own = "<|channel|>analysis<|message|>milk?<|end|><|start|>assistant<|channel|>final<|message|>no milk"
    assert channels.read([*channels.tokenizer(own)["input_ids"], channels.stop]) == own == channels.write(own)


def test_tokens_without_an_embedding_are_refused_in_one_line():
    tokenizer = with_template(SHAPES["chatml"].template)
    model, frame = tiny_model("llama", tiny_tokenizer()), frame_of(tokenizer)
    with pytest.raises(InputError, match=r"ends an answer, got '<\|im_end\|>' with the id 301 and 300 rows"):
        check_vocabulary(tokenizer, model, frame, [])
    check_vocabulary(tokenizer, model, plain_frame(tokenizer), ["a cup of tea"])
    with pytest.raises(InputError, match=r"every token of prompts and answers, got '<\|im_start\|>' with the id 300"):
        check_vocabulary(tokenizer, model, plain_frame(tokenizer), ["a cup", "<|im_start|>of tea"])
    tokenizer.pad_token = "<|end|>"
    with pytest.raises(InputError, match=r"the pad token, got '<\|end\|>'"):
        check_vocabulary(tokenizer, model, plain_frame(tokenizer), [])
    padded = tiny_model("llama", tiny_tokenizer(), vocab_size=384)  # rows beyond the vocabulary are usual
    check_vocabulary(tokenizer, padded, frame, TOKENS)


def test_the_probe_is_found_in_no_template():
    assert not [name for name, shape in SHAPES.items() if any(t in shape.template for t in (chat.QUESTION, chat.ANSWER))]
