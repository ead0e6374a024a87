import subprocess
import sys

import pytest

from kdtool.benchmarks import load_benchmark, names
from kdtool.data.hub_source import HubReference
from kdtool.data.layout import shipped_names
from kdtool.errors import UsageProblem
from kdtool.registry import METRICS, TASKS
from kdtool.sections import DataSection

EXPECTED = [
    "ag-news",
    "banking77",
    "beans",
    "cifar10",
    "cifar100",
    "clinc150",
    "glue-cola",
    "glue-mrpc",
    "glue-rte",
    "glue-sst2",
    "imdb",
    "minds14",
    "speech-commands",
    "tinystories",
    "trec",
]


def test_all_are_there():
    assert names() == EXPECTED


@pytest.mark.parametrize("name", EXPECTED)
def test_a_benchmark_is_complete_and_valid(name):
    benchmark = load_benchmark(name)
    assert benchmark.name == name
    assert benchmark.summary
    assert benchmark.paper
    assert benchmark.task in TASKS.names()
    assert set(benchmark.metrics) <= {*METRICS.names(), "loss", "perplexity"}
    assert benchmark.source in shipped_names() or HubReference.parse(benchmark.source)
    assert DataSection(**benchmark.data_values()).source == benchmark.source


def test_unknown_name_gets_the_nearest():
    with pytest.raises(UsageProblem, match="unknown benchmark 'glue-sst'") as caught:
        load_benchmark("glue-sst")
    assert "glue-sst2" in caught.value.hint


def test_listing_imports_nothing_heavy():
    code = "import sys, kdtool.benchmarks as b; b.load_benchmark('trec'); print({'torch', 'numpy'} & set(sys.modules))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "set()\n"
