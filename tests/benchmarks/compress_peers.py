"""Compressors beside other tools at equal size: quantised linear maps, and pruned shapes at half of the parameters.

One process, one thread, the same model, calibration rows and test rows for all. Peers that are not installed
are left out, and named. See README.md.

    OMP_NUM_THREADS=1 python -m tests.benchmarks.compress_peers --model FOLDER --data FOLDER
"""

import argparse
import copy
import logging
import sys
import time
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from kdtool.compressors._base import Context, divergence, run_over
from kdtool.config import load_config
from kdtool.data.examples import Examples
from kdtool.models import Loaded, load_model
from kdtool.pipelines import setup
from kdtool.pipelines.compress import calibration_batches
from kdtool.pipelines.search import search
from kdtool.pipelines.stages import Standing
from kdtool.registry import COMPRESSORS, TASKS
from kdtool.run import Run
from kdtool.tasks._base import Task

SHARE, GROUP = 0.5, 32


@dataclass
class Bench:
    """The model, its rows and what is compared on them."""

    task: Task
    loaded: Loaded
    context: Context
    test: Examples
    config: Any

    @classmethod
    def make(cls, model: str, data: str) -> "Bench":
        config = load_config("compress", None, [f"search.budget=parameters={SHARE}"], {"data.source": data})
        run, task = Run(offline=True), TASKS.get("text-classification")()
        loaded = load_model(model, task.auto_class, run)
        setup.load_processor(loaded, task, run)
        rows = setup.get_data(config, task, run)
        setup.relabel(rows, loaded, config, run)
        encoded = setup.encode(task, rows, loaded, None, config, run)
        assert encoded.train is not None
        context = Context(task, calibration_batches(task, encoded.train), run, encoded.train, {})
        return cls(task, loaded, context, encoded.test, config)

    def ours(self, name: str, **values: Any) -> nn.Module:
        made: Loaded = COMPRESSORS.get(name)(self.loaded, COMPRESSORS.build_config(name, values), self.context)
        return made.model

    def searched(self, method: str) -> nn.Module:
        """The settings of a method that leave the share, found on the calibration rows."""
        self.config.method = {"name": method}
        standing = Standing(self.loaded, self.context, self.context.batches or [])
        plan = search(standing, self.config, self.context.run).plan
        for name, values in plan:
            standing = standing.through(name, values)
        return standing.loaded.model

    def row(self, model: nn.Module, expected: list[torch.Tensor]) -> tuple[float, float, float]:
        """Accuracy, divergence of the outputs on test rows, and processor seconds of a pass over 32 rows."""
        with torch.no_grad():
            found = self.task.evaluate(model, self.test, self.context.run, ["accuracy"], 64).metrics["accuracy"]
            change = divergence(expected, run_over(model, self.probes))
            batch = self.task.example_inputs(self.test, 32)
            times = []
            for _ in range(4):
                began = time.process_time()
                self.task.forward(model, batch)
                times.append(time.process_time() - began)
        return found, change, min(times)

    @property
    def probes(self) -> Context:
        return Context(self.task, calibration_batches(self.task, self.test), self.context.run)


def torchao(kind: str) -> Callable[[Bench], nn.Module]:
    def make(bench: Bench) -> nn.Module:
        from torchao import quantization as q
        from torchao.quantization.granularity import PerGroup

        config = {
            "int8": lambda: q.Int8WeightOnlyConfig(),
            "int8-dynamic": lambda: q.Int8DynamicActivationInt8WeightConfig(),
            "int4": lambda: q.IntxWeightOnlyConfig(weight_dtype=torch.int4, granularity=PerGroup(GROUP)),
        }[kind]()
        model: Any = copy.deepcopy(bench.loaded.model)
        head = model.classifier
        q.quantize_(model, config, filter_fn=lambda part, _: isinstance(part, nn.Linear) and part is not head)
        return model

    return make


def neural_compressor(bench: Bench) -> nn.Module:
    from neural_compressor.torch.quantization import RTNConfig, convert, prepare

    rounding = RTNConfig(bits=4, group_size=GROUP, use_sym=True)
    rounding.set_local("classifier", RTNConfig(dtype="fp32"))
    return convert(prepare(copy.deepcopy(bench.loaded.model), rounding))  # type: ignore[no-any-return]


def llm_compressor(bench: Bench) -> nn.Module:
    from llmcompressor import oneshot
    from llmcompressor.modifiers.quantization import QuantizationModifier

    groups = {"num_bits": 4, "type": "int", "symmetric": True, "strategy": "group", "group_size": GROUP}
    scheme = {"group_0": {"targets": ["Linear"], "weights": groups}}
    model = copy.deepcopy(bench.loaded.model)
    oneshot(model=model, recipe=QuantizationModifier(config_groups=scheme, ignore=["classifier"]))
    return model


def torch_pruning(importance: str) -> Callable[[Bench], nn.Module]:
    """Channels, neurons and heads of a BERT by Torch-Pruning, its ratio found by bisection."""

    def at(bench: Bench, ratio: float) -> nn.Module:
        import torch_pruning as tp

        model: Any = copy.deepcopy(bench.loaded.model)
        batches = bench.context.batches or []
        inputs = {key: value for key, value in batches[0].items() if key != "labels"}
        layers = model.bert.encoder.layer
        heads = {
            part: model.config.num_attention_heads
            for layer in layers
            for part in (layer.attention.self.query, layer.attention.self.key, layer.attention.self.value)
        }
        rule = {"magnitude": tp.importance.GroupMagnitudeImportance, "taylor": tp.importance.GroupTaylorImportance}
        pruner = tp.pruner.BasePruner(
            model,
            inputs,
            importance=rule[importance](),
            pruning_ratio=ratio,
            num_heads=heads,
            prune_num_heads=True,
            head_pruning_ratio=ratio,
            ignored_layers=[model.classifier],
            output_transform=lambda out: out.logits,
            forward_fn=lambda module, given: module(**given),
        )
        if importance == "taylor":
            for batch in batches:
                out = bench.task.forward(model, batch)
                nn.functional.cross_entropy(out.logits, out.labels).backward()  # type: ignore[arg-type]
        pruner.step()
        for layer in layers:  # the model reads its shapes from these
            own = layer.attention.self
            own.num_attention_heads = pruner.num_heads[own.query]
            own.all_head_size = own.query.out_features
            own.attention_head_size = own.all_head_size // own.num_attention_heads
        model.zero_grad()
        return model

    def make(bench: Bench) -> nn.Module:
        low, high = 0.0, 0.9
        for _ in range(6):
            middle = (low + high) / 2
            if parameters(at(bench, middle)) > SHARE * bench.loaded.parameters:
                low = middle
            else:
                high = middle
        return at(bench, high)

    return make


def parameters(model: nn.Module) -> int:
    from kdtool.modeling.compressed import weights_of

    return weights_of(model)


QUANTIZED: Mapping[str, Callable[[Bench], nn.Module]] = {
    "kdtool quantize int8": lambda b: b.ours("quantize", embeddings="keep"),
    "torchao int8 weight-only": torchao("int8"),
    "kdtool quantize int8-dynamic": lambda b: b.ours("quantize", scheme="int8-dynamic", embeddings="keep"),
    "torchao int8 dynamic": torchao("int8-dynamic"),
    "kdtool quantize int4": lambda b: b.ours("quantize", scheme="int4", group=GROUP, embeddings="keep"),
    "torchao int4": torchao("int4"),
    "neural-compressor RTN int4": neural_compressor,
    "llm-compressor RTN int4": llm_compressor,
}
PRUNED: Mapping[str, Callable[[Bench], nn.Module]] = {
    "kdtool width": lambda b: b.searched("width"),
    "kdtool low-rank": lambda b: b.searched("low-rank"),
    "Torch-Pruning, magnitude": torch_pruning("magnitude"),
    "Torch-Pruning, Taylor": torch_pruning("taylor"),
}


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--data", required=True)
    parser.add_argument("--table", choices=("quantised", "pruned"), help="one of the tables (default: both)")
    given = parser.parse_args(arguments)
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    bench = Bench.make(given.model, given.data)
    expected = run_over(bench.loaded.model, bench.probes)
    accuracy, _, seconds = bench.row(bench.loaded.model, expected)
    print(f"the model itself: accuracy {accuracy:.3f}, {seconds:.3f} s of processor time for 32 rows")
    tables = {"quantised": ("Linear maps quantised", QUANTIZED), "pruned": (f"{SHARE:.0%} of the parameters", PRUNED)}
    for title, forms in tables.values() if given.table is None else [tables[given.table]]:
        print(f"\n| {title} | weights | accuracy | change of the outputs (nats) | time / model's |")
        print("| --- | ---: | ---: | ---: | ---: |")
        for name, make in forms.items():
            try:
                model = make(bench).eval()
                found, change, took = bench.row(model, expected)
            except ImportError as error:
                print(f"| {name} | not installed: {error.name} | | | |")
                continue
            count = "the same" if forms is QUANTIZED else f"{parameters(model) / 1e6:.2f} M"
            print(f"| {name} | {count} | {found:.3f} | {change:.4f} | {took / seconds:.2f} |", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
