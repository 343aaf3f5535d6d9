"""What a data set of the Hub has to be asked for by name.

configurations("openai/gsm8k", error)       # ("main, socratic", "main")
"""

from __future__ import annotations

SHOWN = 12  # names in a message


def configurations(name: str, error: Exception) -> tuple[str, str] | None:
    """The names of a data set's configurations and the first of them; None where it failed for another reason.

    Args:
        error: what `datasets` raised when it was asked for the data set without one.
    """
    import datasets

    if "onfig name is missing" not in str(error):
        return None
    try:
        names: list[str] = datasets.get_dataset_config_names(name)
    except Exception:  # the library raises many kinds
        return None
    more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
    return f"{', '.join(names[:SHOWN])}{more}", names[0]
