"""Arguments about adapters of which each request names its own."""

from dataclasses import dataclass

from common.errors import UserError
from common.flags import arg
from llm.parallel.rules import launched


@dataclass
class RequestAdapterArguments:
    """Which adapters single requests may name."""

    adapters: list[str] = arg(
        [],
        "NAME=DIR of each LoRA adapter or tuned prefix, in PEFT's layout, that single requests may "
        "name: they run together with those that name another one, or none",
        not_with="lora_path|prefix_path",
    )

    def validate(self) -> None:
        """Refuse what is no NAME=DIR, a name twice, and several processes.

        Raises:
            UserError: names the word and the fix.
        """
        if self.adapter_places and launched() > 1:
            raise UserError(
                f"adapters={' '.join(self.adapters)} works in one process, and {launched()} were "
                "launched; drop the flag, or merge one of them (merge_lora.py)"
            )

    @property
    def adapter_places(self) -> dict[str, str]:
        """Directories by name."""
        places: dict[str, str] = {}
        for word in self.adapters:
            name, equals, directory = word.partition("=")
            if not name or not equals or not directory:
                raise UserError(
                    f"adapters: {word!r} has to be NAME=DIR, such as de=outputs/german; requests "
                    "ask for the name"
                )
            if name in places:
                raise UserError(
                    f"adapters: {name!r} is given twice, as {places[name]} and as {directory}; "
                    "give each adapter a name of its own"
                )
            places[name] = directory
        return places
