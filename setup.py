"""What pyproject.toml cannot say: a wheel carries the recipes of ``pipelines/``, where ``shared/packaged.py`` looks."""

import shutil
from pathlib import Path

from setuptools import setup
from setuptools.command.build_py import build_py


class WithRecipes(build_py):
    """Also copies the recipes, unless they are found in the checkout anyway."""

    def run(self) -> None:
        super().run()
        if not self.editable_mode:
            target = Path(self.build_lib) / "k5cache" / "shared" / "recipes"
            shutil.rmtree(target, ignore_errors=True)  # of an earlier build
            target.mkdir(parents=True)
            for recipe in Path(__file__).parent.glob("pipelines/*.toml"):
                shutil.copy(recipe, target)


setup(cmdclass={"build_py": WithRecipes})
