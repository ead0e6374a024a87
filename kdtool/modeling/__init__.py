"""Architectures that transformers lacks, registered with its Auto classes on import.

The `model_type` of each starts with `kdtool-`: by that `kdtool._autoload` knows when to import this.
"""

from transformers import (
    AutoConfig,
    AutoModelForImageClassification,
    AutoModelForSequenceClassification,
)

from kdtool.modeling.cifar_resnet import CifarResNetConfig, CifarResNetForImageClassification
from kdtool.modeling.sentence_classifier import SentenceClassifier, SentenceClassifierConfig

__all__ = [
    "CifarResNetConfig",
    "CifarResNetForImageClassification",
    "SentenceClassifier",
    "SentenceClassifierConfig",
]

AutoConfig.register(SentenceClassifierConfig.model_type, SentenceClassifierConfig, exist_ok=True)
AutoModelForSequenceClassification.register(SentenceClassifierConfig, SentenceClassifier, exist_ok=True)
AutoConfig.register(CifarResNetConfig.model_type, CifarResNetConfig, exist_ok=True)
AutoModelForImageClassification.register(CifarResNetConfig, CifarResNetForImageClassification, exist_ok=True)
