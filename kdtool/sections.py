"""The configuration of a run as sections of typed keys with defaults; strict and torch-free."""

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator

Command = Literal["distill", "compare", "compress", "patch-attention", "evaluate", "export"]


class Section(BaseModel):
    """Base of all sections: unknown keys and wrong types are errors."""

    model_config = ConfigDict(extra="forbid", strict=True, validate_assignment=True, allow_inf_nan=False)

    @field_validator("*", mode="before")
    @classmethod
    def _no_nul(cls, value: Any) -> Any:
        """No name, path or pattern holds a NUL, and the system refuses it in ways of its own."""
        if isinstance(value, str) and "\0" in value:
            raise ValueError("holds a NUL character")
        return value


_ENDPOINT = "endpoint:"
_TEXT_FILES = (".jsonl", ".jsonl.gz", ".csv", ".csv.gz", ".parquet")


class TeacherSection(Section):
    """The model to learn from (or, for one-model commands, the model itself)."""

    model: str | None = None
    """Folder, or Hub id with an optional @revision; or endpoint:URL#MODEL; for methods that learn texts also a file."""
    cache: str | None = None
    """Folder of a teacher cache that stands for the teacher, written cache:FOLDER in place of a model."""
    generate_with: Literal["transformers", "vllm"] = "transformers"
    """Who writes the texts of a model in memory before training: transformers, or a vllm process started for it."""
    fine_tune: bool = False
    """Fine-tune the teacher on the task first; the result is cached by fingerprint."""
    fine_tune_what: Literal["all", "head"] = "all"
    """Train all weights, or fit only the classifier head on frozen features."""
    fine_tune_epochs: float = Field(2.0, gt=0)
    """Length of that fine-tuning."""
    fine_tune_lr: float = Field(1e-4, gt=0)
    """Peak learning rate of that fine-tuning."""

    @property
    def writes_only(self) -> bool:
        """Whether it gives texts and no distributions: an endpoint, or a file of texts."""
        return self.is_file or (self.model or "").startswith(_ENDPOINT)

    @property
    def is_file(self) -> bool:
        """Whether it is a file of texts."""
        name = (self.model or "").lower()
        return name.endswith(_TEXT_FILES) and not name.startswith(_ENDPOINT)


class StudentSection(Section):
    """The model to train."""

    model: str | None = None
    """Folder, Hub id, configuration file (random weights), layers:N or layers:0,3,5."""
    init: Literal["auto", "weights", "random"] = "auto"
    """Start from the weights found (auto, weights) or from random ones."""
    freeze: list[str] = []
    """What stays as it is: `embeddings`, or parameter name patterns such as `*.layer.0.*`."""
    lora_rank: int | None = Field(None, gt=0)
    """Train low-rank additions (LoRA) of this rank to the student's layers, merged at the end; needs peft."""
    lora_alpha: float | None = Field(None, gt=0)
    """Their scale is lora_alpha / lora_rank (default: 2)."""
    lora_targets: list[str] = []
    """Names of the layers that get one, such as q_proj (default: all linear layers but the head)."""
    lora_adapter: bool = False
    """Keep the additions by themselves, too, in the folder `adapter` of the output."""


class DataSection(Section):
    """The examples and the meaning of their columns."""

    source: str | None = None
    """Hub id with optional :config, @revision, #split; folder; file; or a shipped set."""
    task: str | None = None
    """Task name; guessed from the teacher and the columns when absent."""
    train_split: str | None = None
    """Split to train on (default: train)."""
    validation_split: str | None = None
    """Split for choices made during training (default: validation or dev if there is one)."""
    test_split: str | None = None
    """Split of the final proof (default: test, else validation, else held out of train)."""
    holdout: float = Field(0.1, gt=0, lt=1)
    """Share of the training rows held out for the proof when the data has a single split."""
    text: str | None = None
    """Column with the text, or the first sentence of a pair."""
    text_pair: str | None = None
    """Column with the second sentence of a pair."""
    prompt: str | None = None
    """Column with the prompt of a language model."""
    input: str | None = None
    """Column with what the prompt speaks of, put behind it (instruction and input)."""
    response: str | None = None
    """Column with the response to learn."""
    messages: str | None = None
    """Column with conversations: lists of messages, each with role and content."""
    separator: str = "\n"
    """Text between prompt, input and response, where there is no white space already."""
    chat_template: bool = False
    """Put prompts and responses into the tokenizer's chat template, as conversations are."""
    long_prompts: Literal["drop", "cut"] = "drop"
    """Prompts that leave no room for a response: leave the row out, or cut the prompt on the left."""
    mask_share: float = Field(0.15, gt=0, lt=1)
    """Share of the tokens of a text that masked-lm hides, at least one."""
    packing: bool | None = None
    """Put several rows of a causal language model side by side, apart from each other (default: where it can be)."""
    label: str | None = None
    """Column with the class."""
    image: str | None = None
    """Column with the image."""
    audio: str | None = None
    """Column with the audio."""
    features: list[str] | None = None
    """Columns that a model of tables sees (default: all but the label)."""
    ignore: list[str] = []
    """Columns that it does not see."""
    numeric: list[str] = []
    """Columns of it to take as numbers (default: those that hold only numbers)."""
    categorical: list[str] = []
    """Columns of it to take as names, such as codes written as numbers."""
    labels: list[str] | None = None
    """Class names in id order, where the data does not carry them."""
    label_map: Literal["refuse", "by-name"] | dict[str, str] = "refuse"
    """What to do when data and model disagree on classes: refuse, by-name, or {data: model}."""
    max_length: int | None = Field(None, gt=0)
    """Longest sequence in tokens (text) or samples (audio); longer ones are cut."""
    limit: int | None = Field(None, gt=0)
    """Use at most this many training rows (a seeded choice)."""
    test_limit: int | None = Field(None, gt=0)
    """Use at most this many test rows (a seeded choice)."""


class AugmentSection(Section):
    """Altered images to train on; the teacher sees what the student sees, rows to score stay as they are."""

    crop: float = Field(0.0, ge=0, lt=0.5)
    """Shift images by up to this share of their side, black beyond (0.125 is 4 of 32 pixels); 0 for none."""
    flip: bool = False
    """Mirror half of the images."""
    randaugment: int = Field(0, ge=0, le=8)
    """Operations of RandAugment for each image; needs kornia."""
    magnitude: int = Field(9, ge=0, le=30)
    """Their strength."""
    mixup: float = Field(0.0, ge=0, le=1)
    """Mix images and labels of pairs in shares drawn from Beta(mixup, mixup); 0 for none."""
    cutmix: float = Field(0.0, ge=0, le=1)
    """Paste a box of another image, of an area from Beta(cutmix, cutmix); with mixup half of the images each."""
    views: int = Field(0, ge=0)
    """Views of each row, used in turn, so that a teacher cache can hold them; 0 for a new one in each epoch."""
    seed: int = Field(0, ge=0)
    """Seed of the views; apart from runtime.seed, so that runs of several seeds can share a teacher cache."""

    @property
    def active(self) -> bool:
        """Whether anything is altered."""
        return bool(self.crop or self.flip or self.randaugment or self.mixup or self.cutmix)


class TrainSection(Section):
    """The training loop."""

    epochs: float = Field(3.0, gt=0)
    """Passes over the training rows; ignored when max_steps is given."""
    max_steps: int | None = Field(None, gt=0)
    """Optimiser steps."""
    batch_size: int = Field(32, gt=0)
    """Examples in one forward pass."""
    grad_accum: int = Field(1, gt=0)
    """Forward passes in one optimiser step."""
    lr: float | None = Field(None, gt=0)
    """Peak learning rate (default: set by the task)."""
    head_lr: float | None = Field(None, gt=0)
    """Peak learning rate of the classifier head (default: lr)."""
    optimizer: Literal["adamw", "sgd"] = "adamw"
    """Update rule; sgd uses Nesterov momentum 0.9."""
    weight_decay: float = Field(0.01, ge=0)
    """Decoupled decay on matrices; never on biases and norms."""
    warmup: float = Field(0.06, ge=0, le=1)
    """Share of the steps with rising learning rate."""
    schedule: Literal["linear", "cosine", "constant"] = "linear"
    """Course of the learning rate after warm-up."""
    clip: float | None = Field(None, ge=0)
    """Largest gradient norm; 0 switches clipping off (default: 1 for adamw, off for sgd)."""
    parallel: Literal["ddp", "fsdp2"] = "ddp"
    """With several processes: whole student in each, or its parameters sharded over them."""
    buckets: bool = True
    """Batch examples of similar length together."""
    teacher_cache: bool | None = None
    """Keep what a frozen teacher says about each row (default: when rows are seen again)."""
    teacher_cache_dir: str | None = None
    """Folder of a cache to fill and to share between runs (default: inside the unfinished output)."""
    teacher_cache_top_k: int | None = Field(None, gt=0)
    """Keep only so many of the likeliest tokens of a language model (default: all, or 20 of an endpoint)."""
    teacher_cache_limit: int = Field(default=4096, gt=0)
    """Largest size of a cache in MiB."""
    log_every: int = Field(10, gt=0)
    """Steps between two lines of the log."""
    checkpoint_every: int | None = Field(None, gt=0)
    """Steps between two checkpoints (default: ten in a run)."""
    resume: bool = True
    """Go on where an unfinished run of the same configuration stopped; one of another needs --overwrite either way."""


class PatchSection(Section):
    """What patch-attention asks of a layer."""

    layers: str | None = None
    """Numbers of the attention layers to patch, such as 0-3,7 (default: all)."""
    calibrate: str | None = None
    """Data to choose the settings on (default: the training rows of the data)."""
    max_error: float = Field(0.1, ge=0)
    """Largest relative error of a head of a layer; a layer that would miss it stays exact. With 0 all do."""
    lengths: list[int] = Field([512, 2048], min_length=1)
    """Numbers of keys at which error and time are measured."""
    max_drop: list[str] = []
    """How much worse metrics may become, such as accuracy=0.005."""
    fixed: bool = False
    """Fix what an operator would work out from each input, as an export to ONNX needs it."""
    module_pattern: str | None = None
    """Names of modules with a fused projection `qkv` to take in, such as blocks.*.attn."""

    @field_validator("lengths")
    @classmethod
    def _long_enough(cls, value: list[int]) -> list[int]:
        if min(value) < 64:
            raise ValueError("should be 64 and more")
        return sorted(set(value))


class EvalSection(Section):
    """The proof."""

    benchmark: str | None = None
    """Named benchmark: columns, split and metrics in one word."""
    metrics: list[str] | None = None
    """Metrics to compute (default: those of the task)."""
    fail_under: list[str] = []
    """Gates such as accuracy=0.85 or accuracy.retention=0.97."""
    batch_size: int = Field(64, gt=0)
    """Examples in one forward pass of an evaluation."""
    max_new_tokens: int = Field(128, gt=0)
    """Most tokens a language model writes for each prompt, where a metric compares texts."""
    stop: list[str] = []
    """Strings that end what it writes, besides its end-of-sequence token."""
    answers: str = "number"
    """How exact-answer finds the answer in a text: number, text, or a data set with rules of its own, such as gsm8k."""
    temperature_scaling: Literal["val", "off"] = "val"
    """Fit a temperature on the validation rows, where there are any, and show calibration before and after it."""
    latency: bool = True
    """Measure latency of teacher and student."""
    latency_batches: list[int] = [1, 32]
    """Batch sizes at which latency is measured."""
    latency_repeats: int = Field(20, gt=0)
    """Timed forward passes for each model and batch size."""
    lengths: list[int] = []
    """Sequence lengths in tokens at which evaluate measures time and peak memory, too."""
    seeds: list[int] = [0, 1, 2]
    """Seeds of a comparison: every method runs once with each."""
    reload: bool = True
    """Reload the saved model in a fresh process and compare outputs."""

    @field_validator("lengths")
    @classmethod
    def _some_tokens(cls, value: list[int]) -> list[int]:
        if value and min(value) < 2:
            raise ValueError("should be 2 and more")
        return sorted(set(value))


class RecoverSection(Section):
    """Distilling a compressed model back from the model it was made of."""

    steps: int | None = Field(None, gt=0)
    """Optimiser steps; without them nothing is trained."""
    method: str = "kd"
    """Distillation method."""
    settings: dict[str, Any] = {}
    """Its hyper-parameters, such as recover.settings.temperature=2."""


class SearchSection(Section):
    """Looking for the settings of compressors that meet a budget."""

    budget: str | None = None
    """What may be left, as a share: parameters=0.5, bytes=0.25 or latency=0.5."""
    notches: int = Field(8, gt=1)
    """Steps from all to nothing in which a setting is turned down, before the last one is found by bisection."""


class OutputSection(Section):
    """Where the result goes."""

    folder: str | None = None
    """Output folder."""
    overwrite: bool = False
    """Replace what a non-empty output folder holds."""
    format: str = "safetensors"
    """Target format of export."""
    save_teacher: bool = False
    """Keep the teacher that an online method trained, or a mentor, in the folder `teacher` of the output."""
    dtype: Literal["keep", "float32", "float16", "bfloat16"] = "keep"
    """Number format of the saved weights."""
    max_shard_size: str = "5GB"
    """Largest weight file."""
    push: str | None = None
    """Hub repository to publish to."""
    private: bool | None = None
    """Create that repository private."""
    create_pr: bool = False
    """Publish as a pull request."""
    commit_message: str | None = None
    """Message of the published commit."""
    plots: bool = True
    """Draw plots beside the report."""


class RuntimeSection(Section):
    """The machine and what it may do."""

    seed: int = Field(0, ge=0)
    """Seed of all random generators."""
    device: str = "auto"
    """auto, cpu, cuda, cuda:N or mps."""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """Number format of computation; auto is bfloat16 autocast on CUDA, float32 elsewhere."""
    threads: int | None = Field(None, gt=0)
    """CPU threads (default: what torch chooses)."""
    stream: Literal["auto", "always", "never"] = "auto"
    """Work weight by weight, never holding the model: auto does so where it and a copy would not fit into memory."""
    offline: bool = False
    """Never ask the network."""
    cache_dir: str | None = None
    """Hub cache folder (default: HF_HOME)."""
    trust_remote_code: bool = False
    """Run code that a model repository brings."""
    allow_pickle: bool = False
    """Load pickle checkpoints, weights only."""


class RunConfig(Section):
    """Everything a run needs; written to kdtool.json, and a run again when fed back."""

    command: Command = "distill"
    teacher: TeacherSection = TeacherSection()
    student: StudentSection = StudentSection()
    data: DataSection = DataSection()
    method: dict[str, Any] = {}
    augment: AugmentSection = AugmentSection()
    train: TrainSection = TrainSection()
    patch: PatchSection = PatchSection()
    recover: RecoverSection = RecoverSection()
    search: SearchSection = SearchSection()
    eval: EvalSection = EvalSection()
    output: OutputSection = OutputSection()
    runtime: RuntimeSection = RuntimeSection()

    @property
    def method_name(self) -> str:
        """Name of the plug-in that does the work."""
        return str(self.method.get("name", ""))

    @property
    def method_values(self) -> dict[str, Any]:
        """Hyper-parameters of that plug-in that were set."""
        return {key: value for key, value in self.method.items() if key != "name"}
