"""Data: vocabularies, sources of examples and documents, and readers that make batches of them.

A source (PassKey, long text, pairs of text, a seqio task) gives one example per index; a reader
(independent examples, packs, rows that follow a document) makes a batch per step. TensorFlow and
seqio are imported only by `tasks.py`, by `TaskExamples` and by `as_seqio`, when they are used.
"""

from famjax.data.examples import PairExamples
from famjax.data.examples import Source
from famjax.data.examples import TaskExamples
from famjax.data.long_text import LongText
from famjax.data.pair_files import PairFiles
from famjax.data.passkey import Lengths
from famjax.data.passkey import PassKeyFormat
from famjax.data.passkey import PassKeyExamples
from famjax.data.prefetch import prefetch
from famjax.data.questions import QuestionExamples
from famjax.data.readers import ExampleReader
from famjax.data.readers import FollowingReader
from famjax.data.readers import PackedReader
from famjax.data.readers import Reader
from famjax.data.vocabularies import as_seqio
from famjax.data.vocabularies import ByteVocabulary
from famjax.data.vocabularies import load_vocabulary
from famjax.data.vocabularies import Vocabulary
from famjax.data.vocabularies import WordVocabulary

__all__ = [
    "ByteVocabulary",
    "ExampleReader",
    "FollowingReader",
    "Lengths",
    "LongText",
    "PackedReader",
    "PairExamples",
    "PairFiles",
    "PassKeyExamples",
    "PassKeyFormat",
    "QuestionExamples",
    "Reader",
    "Source",
    "TaskExamples",
    "Vocabulary",
    "WordVocabulary",
    "as_seqio",
    "load_vocabulary",
    "prefetch",
]
