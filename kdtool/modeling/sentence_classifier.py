"""A sentence encoder with mean pooling, unit-length embeddings and a linear head.

transformers' `BertForSequenceClassification` reads the first token; sentence encoders such as
all-MiniLM-L6-v2 were trained with mean pooling and classify better that way.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import AutoConfig, AutoModel, PreTrainedConfig, PreTrainedModel
from transformers.modeling_outputs import SequenceClassifierOutput


class SentenceClassifierConfig(PreTrainedConfig):
    """Configuration of `SentenceClassifier`.

    Attributes:
        backbone_config: Configuration of the encoder, any model AutoModel knows.
        logit_scale: Factor of the unit-length embedding before the head.
        normalize: Scale embeddings to length 1.
    """

    model_type = "kdtool-sentence-classifier"
    sub_configs = {"backbone_config": AutoConfig}

    backbone_config: Any = None
    logit_scale: float = 20.0
    normalize: bool = True

    def __post_init__(self, **kwargs: Any) -> None:
        """Turn a stored mapping back into the encoder's configuration."""
        if isinstance(self.backbone_config, dict):
            values = dict(self.backbone_config)
            self.backbone_config = AutoConfig.for_model(values.pop("model_type"), **values)
        super().__post_init__(**kwargs)


def mean_pool(states: Tensor, attention_mask: Tensor) -> Tensor:
    """Mean of the states at real tokens.

    Args:
        states: [batch, length, width]
        attention_mask: [batch, length], 1 at real tokens.

    Returns:
        [batch, width]
    """
    mask = attention_mask.unsqueeze(-1).to(states.dtype)
    return (states * mask).sum(1) / mask.sum(1).clamp_min(1)


class SentenceClassifier(PreTrainedModel):
    """Encoder, mean pooling over real tokens, optional unit length, linear head."""

    config_class = SentenceClassifierConfig
    base_model_prefix = "encoder"
    main_input_name = "input_ids"
    supports_gradient_checkpointing = True
    _supports_sdpa = True
    _supports_attention_backend = True

    def __init__(self, config: SentenceClassifierConfig) -> None:
        super().__init__(config)
        self.encoder = AutoModel.from_config(config.backbone_config, **_without_pooler(config.backbone_config))
        self.classifier = nn.Linear(config.backbone_config.hidden_size, config.num_labels)
        self.post_init()

    def _init_weights(self, module: nn.Module) -> None:
        if isinstance(module, nn.Linear):
            nn.init.normal_(module.weight, std=0.02)
            if module.bias is not None:
                nn.init.zeros_(module.bias)

    def embed(self, input_ids: Tensor, attention_mask: Tensor | None = None, **inputs: Any) -> Tensor:
        """Sentence embeddings [batch, width], scaled as the head expects them."""
        if attention_mask is None:
            attention_mask = torch.ones_like(input_ids)
        states = self.encoder(input_ids=input_ids, attention_mask=attention_mask, **inputs).last_hidden_state
        pooled = mean_pool(states, attention_mask)
        if self.config.normalize:
            pooled = functional.normalize(pooled, dim=-1)
        scaled: Tensor = pooled * self.config.logit_scale
        return scaled

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor | None = None, labels: Tensor | None = None, **inputs: Any
    ) -> SequenceClassifierOutput:
        """Logits [batch, classes], and the mean cross-entropy when labels [batch] are given."""
        inputs.pop("return_dict", None)
        logits = self.classifier(self.embed(input_ids, attention_mask, **inputs))
        loss = None if labels is None else functional.cross_entropy(logits.float(), labels)
        return SequenceClassifierOutput(loss=loss, logits=logits)


def _without_pooler(config: PreTrainedConfig) -> dict[str, Any]:
    """BERT-like encoders carry an unused CLS pooler unless told not to."""
    return {"add_pooling_layer": False} if config.model_type in {"bert", "roberta", "electra", "camembert"} else {}
