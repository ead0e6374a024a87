"""Does inheriting weights help? A masked language model on second-order Markov text, made half as wide in four ways.

python docs/evidence/wid_toy.py --seeds 0,1,2

Held-out loss of masked tokens for: the teacher; `wid`; the same dimensions cut out without compactors, trained as long;
a random model of that size, trained as long; the cut untrained. Text, masks and models come from the seed.
"""

import argparse
import copy
import json
import statistics
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
import transformers
from torch import Tensor

from kdtool.compressors import _wid_merge as merging
from kdtool.compressors import wid
from kdtool.compressors._wid_anatomy import anatomy_of
from kdtool.compressors._wid_method import Inheritance
from kdtool.data.examples import Examples
from kdtool.divergences import cross_entropy
from kdtool.methods import none
from kdtool.models import Loaded
from kdtool.run import Run
from kdtool.sections import TrainSection
from kdtool.tasks._base import Batch, Outputs, Task
from kdtool.train.loop import Trainer
from kdtool.train.state import seed_everything

SHARE = 0.15
"""Share of the symbols that are masked."""


def masked(ids: Tensor, mask: int) -> Batch:
    """Ids [rows, n] with a share of them masked, and labels that hold those alone."""
    chosen = torch.rand(ids.shape) < SHARE
    return {"input_ids": ids.masked_fill(chosen, mask), "labels": ids.masked_fill(~chosen, -100)}


class MarkovTask(Task):
    """Masked symbols; other ones are masked whenever a row is seen."""

    name = "masked-lm"

    def __init__(self, mask: int) -> None:
        self.mask = mask

    def collate(self, items: Sequence[Any]) -> Batch:
        """Mask anew."""
        return masked(torch.tensor(np.stack([item["input_ids"] for item in items])), self.mask)

    def forward(self, model: Any, batch: Batch) -> Outputs:
        """Units are masked symbols."""
        logits, labels = model(input_ids=batch["input_ids"]).logits, batch["labels"]
        return Outputs(logits[labels != -100], labels[labels != -100])


def text(rows: int, length: int, symbols: int, seed: int) -> Examples:
    """Sequences of which each symbol depends on the two before it, in the same way for all seeds."""
    first, second = np.random.default_rng(12345).normal(0, 2, (2, symbols, symbols))
    odds = np.exp(first[:, None] + second[None])
    law = (odds / odds.sum(-1, keepdims=True)).cumsum(-1)
    generator = np.random.default_rng(seed)
    ids = np.zeros((rows, length), dtype=np.int64)
    ids[:, :2] = generator.integers(0, symbols, (rows, 2))
    for at in range(2, length):
        draws = generator.random((rows, 1))
        ids[:, at] = (draws > law[ids[:, at - 2], ids[:, at - 1]]).sum(1).clip(max=symbols - 1)
    return Examples({"input_ids": ids})


class Toy:
    """One seed of the comparison.

    Args:
        seed: Of models, rows and masks.
        hidden: Width of the teacher, in four heads; the others are half as wide.
        symbols: Size of the alphabet.
        length: Symbols in a row.
        rows: Training rows; the law of the text is the same for all seeds.
    """

    def __init__(self, seed: int, hidden: int = 48, symbols: int = 12, length: int = 24, rows: int = 4096) -> None:
        self.seed, self.hidden, self.task = seed, hidden, MarkovTask(symbols)
        self.shape = {"vocab_size": symbols + 1, "max_position_embeddings": length}
        self.rows = text(rows, length, symbols, 1000 + seed)
        ids = torch.tensor(text(1024, length, symbols, 999).columns["input_ids"])
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.test = masked(ids, symbols)

    def bert(self, hidden: int) -> Any:
        """Two layers of four heads, with random weights."""
        sizes = {"num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 4 * hidden}
        config = transformers.BertConfig(
            hidden_size=hidden,
            hidden_dropout_prob=0.0,
            attention_probs_dropout_prob=0.0,
            initializer_range=0.1,
            tie_word_embeddings=False,
            **sizes,
            **self.shape,
        )
        return transformers.BertForMaskedLM(config)

    @torch.no_grad()
    def loss(self, model: Any) -> float:
        """Mean cross-entropy of masked symbols in held-out rows."""
        out = self.task.forward(model.eval(), self.test)
        assert out.labels is not None
        return float(cross_entropy(out.logits, out.labels)) / len(out.labels)

    def fit(self, model: Any, steps: int, lr: float) -> Any:
        """A trained copy."""
        seed_everything(self.seed)
        method = none.Method(none.Config(), Loaded(copy.deepcopy(model), None, "toy"), [], self.task)
        settings = TrainSection(max_steps=steps, lr=lr, batch_size=32)
        Trainer(method, self.rows, settings, Run(seed=self.seed)).train()
        return method.student

    def inherit(self, teacher: Any, config: wid.Config) -> Inheritance:
        """Compactors around the teacher, trained."""
        seed_everything(self.seed)
        anatomy = anatomy_of(teacher)
        method = Inheritance(wid.goal_of(config, anatomy), Loaded(teacher, None, "toy"), anatomy, self.task)
        settings = TrainSection(max_steps=config.steps, lr=config.lr, head_lr=config.weights_lr, batch_size=32)
        Trainer(method, self.rows, settings, Run(seed=self.seed), method.is_own_weight).train()
        return method

    def compare(
        self,
        teacher_steps: int = 1500,
        steps: int = 700,
        interval: int = 12,
        more: int = 300,
        rates: Sequence[float] = (3e-3, 1e-3),
    ) -> dict[str, float]:
        """Held-out loss by model, and the largest norm of what `wid` dropped.

        Args:
            teacher_steps: Training of the teacher.
            steps: Training of each of the others.
            interval: Steps between two choices of what to drop.
            more: Steps that `wid` and the random model go on for.
            rates: Peak learning rates to train the cut with.
        """
        seed_everything(self.seed)
        teacher = self.fit(self.bert(self.hidden), teacher_steps, 3e-3)
        half = wid.Config(self.hidden // 2, steps=steps, interval=interval, lr=1e-3, weights_lr=3e-4, penalty=20.0)
        method = self.inherit(teacher, half)
        anatomy, student, cut = method.anatomy, self.bert(self.hidden // 2), self.bert(self.hidden // 2)
        student.load_state_dict(method.inherited())
        identity = {name: torch.eye(len(p)) for name, p in merging.compactors_of(method.student, anatomy).items()}
        factor = merging.query_factor(anatomy.head_size, anatomy.head_size // 2)
        cut.load_state_dict(merging.merge(teacher.state_dict(), identity, method.keep, anatomy, factor))
        seed_everything(self.seed)
        fresh = self.fit(self.bert(self.hidden // 2), steps, 3e-3)
        found = {
            "teacher": self.loss(teacher),
            "wid": self.loss(student),
            "wid before merging": self.loss(method.masked()),
            **{f"trained cut, lr {rate:g}": self.loss(self.fit(cut, steps, rate)) for rate in rates},
            "random, trained": self.loss(fresh),
            "cut, untrained": self.loss(cut),
            "largest dropped norm": merging.largest_dropped_norm(method.student, anatomy, method.keep),
        }
        if more:
            found[f"wid, {more} more steps"] = self.loss(self.fit(student, more, 1e-3))
            found[f"random, {more} more steps"] = self.loss(self.fit(fresh, more, 1e-3))
        return found


def main() -> None:
    """Run all seeds, print mean and standard deviation."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", default="0,1,2")
    parser.add_argument("--json", action="store_true")
    given = parser.parse_args()
    torch.set_num_threads(1)
    runs = [Toy(int(seed)).compare() for seed in given.seeds.split(",")]
    if given.json:
        print(json.dumps(runs))
        return
    for name in runs[0]:
        values = [run[name] for run in runs]
        spread = statistics.stdev(values) if len(values) > 1 else 0.0
        print(f"{name:28} {statistics.mean(values):.3f} +- {spread:.3f}")


if __name__ == "__main__":
    main()
