"""Architectures that transformers lacks, registered with its Auto classes on import."""

from transformers import AutoConfig, AutoModelForSequenceClassification

from kdtool.modeling.sentence_classifier import SentenceClassifier, SentenceClassifierConfig

__all__ = ["SentenceClassifier", "SentenceClassifierConfig"]

AutoConfig.register(SentenceClassifierConfig.model_type, SentenceClassifierConfig, exist_ok=True)
AutoModelForSequenceClassification.register(SentenceClassifierConfig, SentenceClassifier, exist_ok=True)
