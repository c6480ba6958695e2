"""Scores of the benchmark, on plain arrays."""

import collections
import re
import string

import numpy as np


def accuracy(predicted, labels):
    """Share of right answers."""
    return float(np.mean(np.asarray(predicted) == np.asarray(labels)))


def f1(predicted, labels):
    """F1 of class 1; 0 where it is neither predicted nor there."""
    predicted, labels = np.asarray(predicted) == 1, np.asarray(labels) == 1
    both = predicted.sum() + labels.sum()
    return float(2 * (predicted & labels).sum() / both) if both else 0.0


def pearson(a, b):
    """Correlation; 0 where one of the two does not vary."""
    a, b = (np.asarray(values, dtype=np.float64) - np.mean(values, dtype=np.float64) for values in (a, b))
    size = np.sqrt((a * a).sum() * (b * b).sum())
    return float((a * b).sum() / size) if size else 0.0


def spearman(a, b):
    """Correlation of the ranks, equal values sharing their mean rank."""
    return pearson(_ranks(a), _ranks(b))


def _ranks(values):
    _, place, counts = np.unique(np.asarray(values), return_inverse=True, return_counts=True)
    return (np.cumsum(counts) - (counts - 1) / 2)[place]


def ranking(scores, labels, groups):
    """`(MAP, MRR)`: means over the groups that hold a right answer. Ties stay in the order given."""
    members = collections.defaultdict(list)
    for score, label, group in zip(scores, labels, groups, strict=True):
        members[group].append((float(score), int(label)))
    precisions, reciprocals = [], []
    for pairs in members.values():
        right = np.array([label for _, label in sorted(pairs, key=lambda pair: -pair[0])])
        places = np.flatnonzero(right) + 1
        if len(places):
            precisions.append(np.mean(np.arange(1, len(places) + 1) / places))
            reciprocals.append(1 / places[0])
    return float(np.mean(precisions)), float(np.mean(reciprocals))


def normalise(answer):
    """SQuAD's: lower case, without punctuation, articles and superfluous white space."""
    answer = "".join(character for character in answer.lower() if character not in string.punctuation)
    return " ".join(re.sub(r"\b(a|an|the)\b", " ", answer).split())


def exact_match(predicted, answers):
    """1.0 if the prediction is one of the answers, after `normalise`."""
    return float(any(normalise(predicted) == normalise(answer) for answer in answers))


def word_f1(predicted, answers):
    """SQuAD's F1: overlap of words with the nearest of the answers."""
    return max(_word_f1(normalise(predicted).split(), normalise(answer).split()) for answer in answers)


def _word_f1(predicted, answer):
    if not predicted or not answer:
        return float(predicted == answer)
    common = sum((collections.Counter(predicted) & collections.Counter(answer)).values())
    return 2 * common / (len(predicted) + len(answer))
