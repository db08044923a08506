"""What a conversion gives, and the file that is made of it."""

import json
from pathlib import Path
from typing import NamedTuple

from gs_d2.weights import write_weights


class Converted(NamedTuple):
    """Weights by the names of our networks.

    Attributes:
        title: the network that the published file holds.
        content: of the file to write: float32 tensors by name, or a dict with these as "model".
        config: YAML of what a config with these weights sets; "{weights}" stands for the file.
        file_name: the file in weights/ that our configs name.
        left_out: what of the published file is not in `content`, in words.
    """

    title: str
    content: dict
    config: str
    file_name: str
    left_out: str = ""

    @property
    def tensors(self) -> dict:
        return self.content.get("model", self.content)

    def save(self, output: Path | None = None) -> str:
        """Writes the file, to weights/ if no other is named.

        Returns:
            what a user needs to know: the title, and the config as YAML.

        Raises:
            OSError, ImportError: it cannot be written; what was there is kept.
        """
        output = output or Path("weights") / self.file_name
        write_weights(output, self.content)
        config = self.config.replace("{weights}", json.dumps(str(output)))  # JSON's strings are YAML's too
        return f"# {self.title}, {len(self.tensors)} tensors; left out: {self.left_out or 'nothing'}\n{config}"


def check_suffix(output: Path | None, *suffixes: str) -> None:
    """Raises ValueError unless a file to write ends in one of them."""
    if output is not None and output.suffix not in suffixes:
        raise ValueError(f"{output}: the file to write must be named {' or '.join(suffixes)}")
