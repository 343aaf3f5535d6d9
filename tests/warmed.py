"""Imported by the server of many_ranks.py: what each process would make anew, or wait for, as conftest.py has it."""

import functools
import os

import jinja2
from accelerate.utils import imports
from transformers.conversion_mapping import get_checkpoint_conversion_mapping

os.fsync = lambda descriptor: None  # type: ignore[assignment]
imports._is_package_available = functools.cache(imports._is_package_available)
jinja2.Environment.compile = functools.cache(jinja2.Environment.compile)  # type: ignore[method-assign]
get_checkpoint_conversion_mapping("llama")  # a thousand regular expressions
