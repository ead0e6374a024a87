"""Architectures that transformers lacks, registered with its Auto classes on import.

The `model_type` of each starts with `kdtool-`: by that `kdtool._autoload` knows when to import this.
"""

from transformers import (
    AutoConfig,
    AutoFeatureExtractor,
    AutoModel,
    AutoModelForAudioClassification,
    AutoModelForCausalLM,
    AutoModelForImageClassification,
    AutoModelForMaskedLM,
    AutoModelForSequenceClassification,
)

from kdtool.modeling.cifar_resnet import CifarResNetConfig, CifarResNetForImageClassification
from kdtool.modeling.compressed import (
    CompressedConfig,
    CompressedForAudioClassification,
    CompressedForCausalLM,
    CompressedForImageClassification,
    CompressedForMaskedLM,
    CompressedForSequenceClassification,
)
from kdtool.modeling.sentence_classifier import SentenceClassifier, SentenceClassifierConfig
from kdtool.modeling.simkd import (
    SimKDConfig,
    SimKDForAudioClassification,
    SimKDForImageClassification,
    SimKDForSequenceClassification,
    SimKDForTabularClassification,
)
from kdtool.modeling.tabular import TabularClassifier, TabularConfig
from kdtool.modeling.tabular_processor import TabularProcessor

__all__ = [
    "CifarResNetConfig",
    "CifarResNetForImageClassification",
    "CompressedConfig",
    "CompressedForAudioClassification",
    "CompressedForCausalLM",
    "CompressedForImageClassification",
    "CompressedForMaskedLM",
    "CompressedForSequenceClassification",
    "SentenceClassifier",
    "SentenceClassifierConfig",
    "SimKDConfig",
    "SimKDForAudioClassification",
    "SimKDForImageClassification",
    "SimKDForSequenceClassification",
    "SimKDForTabularClassification",
    "TabularClassifier",
    "TabularConfig",
    "TabularProcessor",
]

AutoConfig.register(SentenceClassifierConfig.model_type, SentenceClassifierConfig, exist_ok=True)
AutoModelForSequenceClassification.register(SentenceClassifierConfig, SentenceClassifier, exist_ok=True)
AutoConfig.register(CifarResNetConfig.model_type, CifarResNetConfig, exist_ok=True)
AutoModelForImageClassification.register(CifarResNetConfig, CifarResNetForImageClassification, exist_ok=True)
AutoConfig.register(SimKDConfig.model_type, SimKDConfig, exist_ok=True)
AutoModelForAudioClassification.register(SimKDConfig, SimKDForAudioClassification, exist_ok=True)
AutoModelForImageClassification.register(SimKDConfig, SimKDForImageClassification, exist_ok=True)
AutoModelForSequenceClassification.register(SimKDConfig, SimKDForSequenceClassification, exist_ok=True)
AutoModel.register(SimKDConfig, SimKDForTabularClassification, exist_ok=True)
AutoConfig.register(TabularConfig.model_type, TabularConfig, exist_ok=True)
AutoModel.register(TabularConfig, TabularClassifier, exist_ok=True)
AutoFeatureExtractor.register(TabularConfig, TabularProcessor, exist_ok=True)
AutoConfig.register(CompressedConfig.model_type, CompressedConfig, exist_ok=True)
AutoModelForAudioClassification.register(CompressedConfig, CompressedForAudioClassification, exist_ok=True)
AutoModelForCausalLM.register(CompressedConfig, CompressedForCausalLM, exist_ok=True)
AutoModelForMaskedLM.register(CompressedConfig, CompressedForMaskedLM, exist_ok=True)
AutoModelForImageClassification.register(CompressedConfig, CompressedForImageClassification, exist_ok=True)
AutoModelForSequenceClassification.register(CompressedConfig, CompressedForSequenceClassification, exist_ok=True)
