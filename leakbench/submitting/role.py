"""The child's half of `leakbench check`: imports the entry and tries one law at a time."""

from __future__ import annotations

from typing import Any

from leakbench.attack import Attack
from leakbench.runner.loading import load_entry
from leakbench.runner.wire import Message
from leakbench.submitting.attack_laws import ATTACK_LAWS
from leakbench.submitting.blocks import provide
from leakbench.submitting.defense_laws import DEFENSE_LAWS
from leakbench.submitting.laws import Broken

Reply = tuple[str, dict[str, Any], dict[str, Any]]


class CheckRole:
    """An entry and the tiny tasks it is tried on.

    The request's body holds ``entry`` (an entry request); its blob ``digits`` holds ``images`` (n, 1, 8, 8), uint8, and
    ``labels`` (n,).
    """

    def __init__(self, message: Message) -> None:
        examples = message.tensors("digits")
        provide(examples["images"], examples["labels"])
        self.cls = type(load_entry(message.body["entry"], {}))
        laws = ATTACK_LAWS if issubclass(self.cls, Attack) else DEFENSE_LAWS
        self.laws = {law.name: law for law in laws}

    def check(self, message: Message) -> Reply:
        """Try one law: ``law`` of the body names it."""
        try:
            remark = self.laws[message.body["law"]].check(self.cls)
        except Broken as broken:
            return "law", {"broken": str(broken)[:2000]}, {}
        return "law", {"remark": remark}, {}
