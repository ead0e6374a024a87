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


@pytest.mark.parametrize(
    "imports",
    [
        "import kdtool; import transformers",
        "import transformers; import kdtool",
        "import transformers; transformers.AutoModel; import kdtool",
        "import transformers.models.auto.configuration_auto; import kdtool",
    ],
)
def test_auto_classes_load_in_any_order_of_imports(imports, folder):
    code = f"""
import sys
{imports}
assert "kdtool.modeling" not in sys.modules
print(type(transformers.AutoModelForImageClassification.from_pretrained(sys.argv[1])).__name__)
"""
    assert run(code, folder) == "CifarResNetForImageClassification"


def test_configurations_load_alone(folder):
    code = "import kdtool, sys; from transformers import AutoConfig; print(AutoConfig.from_pretrained(sys.argv[1]).n)"
    assert run(code, folder) == "1"


def test_unknown_architectures_stay_unknown():
    code = """
import kdtool
from transformers import AutoConfig
for name in ("kdtool-nothing", "nothing"):
    try:
        AutoConfig.for_model(name)
    except ValueError:
        print("unknown")
"""
    assert run(code).split() == ["unknown", "unknown"]
