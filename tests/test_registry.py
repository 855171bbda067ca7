import subprocess
import sys

import pytest

from finetune import registry
from finetune.errors import FinetuneError


def test_names_are_the_words_of_the_folder():
    assert "lora" in registry.names("methods")
    for group in registry.GROUPS:
        found = registry.names(group)
        assert found == sorted(found)
        assert not [name for name in found if name == "base" or name.startswith("_")]


def test_only_the_named_file_is_imported():
    code = ("import sys; from finetune import registry; [registry.names(g) for g in registry.GROUPS];"
            "registry.summary('methods', 'lora'); registry.find('commands', 'recipes');"
            "print(*sorted(name for name in sys.modules if name.startswith('finetune.')))")
    said = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert said.split() == ["finetune.commands", "finetune.commands.recipes", "finetune.errors",
                            "finetune.registry", "finetune.terminal"]


def test_a_wrong_word_gets_the_nearest_right_one():
    with pytest.raises(FinetuneError, match="unknown method 'Loar'; did you mean 'lora'\\?\n    methods: "):
        registry.find("methods", "Loar")
    with pytest.raises(FinetuneError, match="unknown format 'xxxxx'\n    formats: diffusers, kohya"):
        registry.check("formats", "xxxxx")


@pytest.mark.parametrize("word", ["base", "../cli", "lora.py", "", "__init__"])
def test_only_words_of_the_folder_are_found(word):
    with pytest.raises(FinetuneError, match="unknown method"):
        registry.find("methods", word)


def test_every_module_says_what_it_is():
    for group in registry.GROUPS:
        for name in registry.names(group):
            assert registry.summary(group, name), f"{group}/{name}.py has no docstring"
