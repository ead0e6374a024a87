"""`import kdtool` makes transformers know kdtool's models, and imports neither it nor torch."""

import subprocess
import sys

import pytest

from kdtool.modeling.cifar_resnet import CifarResNetConfig, CifarResNetForImageClassification


def run(code, *arguments):
    done = subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("resnet")
    CifarResNetForImageClassification(CifarResNetConfig(n=1, widths=[4, 4, 4])).save_pretrained(path)
    return str(path)


def test_importing_kdtool_alone_imports_nothing_heavy():
    code = "import sys, kdtool; print([m for m in ('torch', 'transformers', 'kdtool.modeling') if m in sys.modules])"
    assert run(code) == "[]"


ORDERS = [
    "import kdtool; import transformers",
    "import transformers; import kdtool",
    "import transformers; transformers.AutoModel; import kdtool",
    "import transformers.models.auto.configuration_auto; import kdtool",
]


def test_auto_classes_load_in_any_order_of_imports(folder):
    """Each order in a fork of a process that has nothing but what is slow and takes no part in it."""
    code = f"""
import os, sys
import scipy.optimize, torch.distributed.tensor, torch._dynamo, torch.fx.experimental.symbolic_shapes
for imports in {ORDERS!r}:
    pid = os.fork()
    if pid == 0:
        assert not [name for name in sys.modules if name.partition(".")[0] in ("transformers", "kdtool")]
        exec(imports)
        assert "kdtool.modeling" not in sys.modules
        print(type(transformers.AutoModelForImageClassification.from_pretrained(sys.argv[1])).__name__, flush=True)
        os._exit(0)
    assert os.waitpid(pid, 0)[1] == 0, imports
"""
    assert run(code, folder).split() == ["CifarResNetForImageClassification"] * len(ORDERS)


def test_configurations_load_alone_and_unknown_architectures_stay_unknown(folder):
    code = """
import kdtool, sys
from transformers import AutoConfig
print(AutoConfig.from_pretrained(sys.argv[1]).n)
for name in ("kdtool-nothing", "nothing"):
    try:
        AutoConfig.for_model(name)
    except ValueError:
        print("unknown")
"""
    assert run(code, folder).split() == ["1", "unknown", "unknown"]
