"""Data: sources, decoding and batches. `open_images` -> `train_batches` or `eval_batches` -> `prefetch_to_device`."""

from jepa_jax.data.config import IMAGENET_MEAN as IMAGENET_MEAN
from jepa_jax.data.config import IMAGENET_STD as IMAGENET_STD
from jepa_jax.data.config import DataConfig as DataConfig
from jepa_jax.data.config import reset_unread as reset_unread
from jepa_jax.data.config import unread_settings as unread_settings
from jepa_jax.data.images import BadImages as BadImages
from jepa_jax.data.images import ImageSet as ImageSet
from jepa_jax.data.images import StorageFailed as StorageFailed
from jepa_jax.data.images import TooManyBadImages as TooManyBadImages
from jepa_jax.data.images import open_images as open_images
from jepa_jax.data.images import row_columns as row_columns
from jepa_jax.data.pipeline import eval_batches as eval_batches
from jepa_jax.data.pipeline import row_batches as row_batches
from jepa_jax.data.pipeline import train_batches as train_batches
from jepa_jax.data.prefetch import DevicePrefetch as DevicePrefetch
from jepa_jax.data.prefetch import prefetch_to_device as prefetch_to_device
from jepa_jax.data.prefetch import put_batch as put_batch
from jepa_jax.data.schema import Column as Column
from jepa_jax.data.schema import abstract_batch as abstract_batch
from jepa_jax.data.schema import empty_rows as empty_rows
from jepa_jax.data.schema import image_columns as image_columns
from jepa_jax.data.schema import zero_batch as zero_batch
from jepa_jax.data.sources import open_source as open_source
from jepa_jax.data.sources import write_array_record as write_array_record
