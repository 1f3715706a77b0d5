"""jaxlm: pretrain, fine-tune, evaluate and serve Transformer language models in JAX, from one config.

    jaxlm prepare  --config=FILE[:size]                   sources to a token store
    jaxlm train    --config=FILE[:size] --workdir=DIR     the same command resumes
    jaxlm evaluate --workdir=DIR [--data=SOURCE]          loss, perplexity, bits per byte
    jaxlm generate --workdir=DIR [--prompt=TEXT]          samples, streamed
    jaxlm plan     --config=FILE[:size] --topology=v5e:4x4 compile the train step for devices that are not here
    jaxlm convert  SOURCE DESTINATION                     a Hugging Face folder to a workdir, or back
    jaxlm report   DIR                                    report.html from a run's metrics

Any key of the config is changed by --config.a.b=value. `jaxlm PROGRAM --help` tells more.
"""

import importlib
import sys

from jaxlm import lookup, program

PROGRAMS = ("prepare", "train", "evaluate", "generate", "plan", "convert", "report")


def main() -> None:
    """The command `jaxlm`: hand the rest of the line to a program."""
    if len(sys.argv) < 2 or sys.argv[1] in ("-h", "--help", "help"):
        print((__doc__ or "").strip())
        return
    name = sys.argv[1]
    if name not in PROGRAMS:
        print(lookup.miss("jaxlm", name, PROGRAMS), file=sys.stderr)
        sys.exit(2)
    program.ask_for_huge_pages()  # before the imports, which take seconds
    program.keep_compiled()
    program.run(name, importlib.import_module(f"jaxlm.{name}").main, sys.argv[2:])


if __name__ == "__main__":
    main()
