"""Datasets of TFDS, prepared on this machine at their first use: in $TFDS_DATA_DIR, or ~/tensorflow_datasets."""

from collections.abc import Mapping, Sequence

import seqio

from moe_jax.types import ConfigError


class TfdsSource(seqio.TfdsDataSource):
  """As seqio's, which counts files and examples before it has any; this one first downloads what is missing.

  Nothing is downloaded, or looked for, before a task is read.
  """

  def __init__(self, name: str, splits: Sequence[str] | Mapping[str, str]):
    """Splits are said here, so that nothing need be read to know them; a mapping is of ours to those of TFDS."""
    super().__init__(name, splits=splits)

  def prepare(self) -> None:
    """Raises ConfigError, in one line, if the dataset is not here and cannot be made."""
    builder = self.tfds_dataset.builder
    if builder.info.splits:
      return
    try:
      builder.download_and_prepare()
    except Exception as error:  # of networks, of files that one must fetch by hand, of a missing Apache Beam
      reason = (str(error).strip() or type(error).__name__).splitlines()[0]
      raise ConfigError(
        f'{self.tfds_dataset.name} is not in {builder.data_dir}, and cannot be made there: {reason}'
        ' (TFDS_DATA_DIR says where it may be; `tfds build` makes it elsewhere).'
      ) from error

  def list_shards(self, split: str) -> Sequence[str]:
    self.prepare()
    return super().list_shards(split)

  def get_dataset(self, *arguments: object, **options: object) -> object:
    self.prepare()
    return super().get_dataset(*arguments, **options)

  def num_input_examples(self, split: str) -> int | None:
    self.prepare()
    return super().num_input_examples(split)
