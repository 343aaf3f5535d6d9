"""Its old name: `zopro.system.launch`."""

from zopro.system.launch import Processes as Job
from zopro.system.launch import alone

__all__ = ["Job", "alone"]
