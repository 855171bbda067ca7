"""Nothing from outside runs code: shipped sources hold none of what could."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
MODULES = {"pickle", "cPickle", "dill", "cloudpickle", "joblib", "shelve", "marshal", "yaml"}
BUILTINS = {"eval", "exec", "compile", "__import__"}
CALLS = {"os.system", "os.popen", "torch.load", "numpy.load", "np.load", "pandas.read_pickle", "extractall",
         "importlib.reload"}
ORDERS = {"shell", "allow_pickle", "trust_remote_code"}


def dangers(source: str) -> list[str]:
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, (ast.Import, ast.ImportFrom)):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else [node.module or ""]
            found += [name for name in names if name.split(".")[0] in MODULES]
        if isinstance(node, ast.Call):
            if isinstance(node.func, ast.Name) and node.func.id in BUILTINS:
                found.append(node.func.id)
            called = ast.unparse(node.func)
            found += [call for call in CALLS if called == call or called.endswith(f".{call}")]
            found += [f"{word.arg}=" for word in node.keywords
                      if word.arg in ORDERS and not (isinstance(word.value, ast.Constant) and word.value.value is False)]
            if called.endswith("YAML") and not any(word.arg == "typ" and ast.unparse(word.value) == "'safe'"
                                                   for word in node.keywords):
                found.append(ast.unparse(node))
    return found


@pytest.mark.parametrize("path", sorted((ROOT / "finetune").rglob("*.py")), ids=lambda path: str(path.relative_to(ROOT)))
def test_no_shipped_source_runs_what_it_is_given(path):
    assert not dangers(path.read_text(encoding="utf-8"))


def test_the_check_sees_what_it_must():
    for bad in ("import pickle", "from yaml import load", "eval('1')", "x.torch.load(f)", "run(c, shell=True)", "YAML()",
                "np.load(f, allow_pickle=True)", "tar.extractall(p)"):
        assert dangers(bad), bad
    assert not dangers("model.eval(); subprocess.run(c); YAML(typ='safe', pure=True); re.compile('a')")
