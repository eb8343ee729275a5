"""What is made of a model's text, and of a target, before metrics compare them: (text, example, is_target) -> value.

Of scored tasks only targets come here.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from tasks.metrics import INVALID, Grouped

Example = Mapping[str, Any]


def class_of(text: str, classes: Sequence[str], **unused: object) -> int:
  """The number of the class that a text names, or `INVALID`."""
  text = text.strip()
  return list(classes).index(text) if text in classes else INVALID


def rating_of(text: str, **unused: object) -> float:
  """The number that a text is, or -1."""
  try:
    return float(text)
  except ValueError:
    return -1.0


def references_of(text: str, example: Example, is_target: bool) -> str | list[str]:
  """As a target, all texts that are right: the example's 'references', string[n]."""
  return [reference.decode() for reference in example['references']] if is_target else text


def choice_of_question(text: str, example: Example, **unused: object) -> Grouped:
  """What a choice is worth, and to which question; see `multiple_choice.rank_choices`."""
  return Grouped((int(example['question']),), float(example['worth']))
