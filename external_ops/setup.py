"""Builds the native kernels: ``pip install ./external_ops`` or ``python setup.py install``.

How is in building.py, with the environment variables that choose compilers and architectures.
"""

import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE))

import building

NAME = "llama_paddle_ops"


class BuildOps(build_ext):
    """Compiles and links the library into the package that is being built."""

    def run(self) -> None:
        """Build; what cannot be is one message, not a traceback."""
        try:
            building.build((HERE if self.inplace else Path(self.build_lib)) / NAME, NAME)
        except building.BuildError as error:
            raise SystemExit(f"error: {error}") from None


setup(
    name="llama-paddle-ops",
    version="0.1.0",
    description="Native kernels of the Llama suite as Paddle custom operators",
    packages=[NAME],
    ext_modules=[Extension(f"{NAME}.library", [])],
    cmdclass={"build_ext": BuildOps},
    python_requires=">=3.11",
    zip_safe=False,
)
