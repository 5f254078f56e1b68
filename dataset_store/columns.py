"""Frames of an episode to the columns of the data files, and columns to Arrow."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from manyhands import codec
from manyhands.dataset.v1 import dataset_pb2

from .definition import POLICY_COLUMN, PROPOSED_PREFIX, SOURCE_COLUMN, Column, Definition

Columns = dict[str, npt.NDArray[Any]]


def columns_of(
    frames: Iterable[dataset_pb2.Frame],
    definition: Definition,
    *,
    episode_index: int,
    first_frame: int,
    task_indices: Mapping[str, int],
) -> Columns:
    """Arrays (n, *shape) by column name, scalars (n,), in the definition's order."""
    values: dict[str, list[Any]] = {column.name: [] for column in definition.columns}
    states = {feature.name for feature in definition.spec.states}
    num_frames = 0
    for frame in frames:
        for value in frame.observation:
            if value.name in states:
                values[value.name].append(codec.decode_value(value))
        proposed = frame.proposed_action or frame.action
        for executed, wanted in zip(frame.action, proposed, strict=True):
            values[executed.name].append(codec.decode_value(executed))
            values[PROPOSED_PREFIX + executed.name].append(codec.decode_value(wanted))
        values[SOURCE_COLUMN].append(frame.source)
        # Number 0 is a version too: what a server was started with.
        values[POLICY_COLUMN].append(frame.version.number if frame.HasField("version") else -1)
        values["task_index"].append(task_indices[frame.task])
        num_frames += 1
    frame_index = np.arange(num_frames, dtype=np.int64)
    values["timestamp"] = [np.float32(k / definition.fps) for k in range(num_frames)]
    values["frame_index"] = list(frame_index)
    values["episode_index"] = [episode_index] * num_frames
    values["index"] = list(first_frame + frame_index)
    return {
        column.name: np.asarray(values[column.name], dtype=column.dtype).reshape(-1, *_stored_shape(column))
        for column in definition.columns
    }


def to_table(columns: Columns, definition: Definition) -> pa.Table:
    arrays = [_to_arrow(columns[column.name], column) for column in definition.columns]
    return pa.Table.from_arrays(arrays, schema=data_schema(definition))


def data_schema(definition: Definition) -> pa.Schema:
    """One for all data files of a dataset."""
    return pa.schema([(column.name, _arrow_type(column)) for column in definition.columns])


def from_table(table: pa.Table) -> Columns:
    """Arrays (n, *shape) by column name, (n,) for scalars; the reverse of to_table."""
    columns: Columns = {}
    for name in table.column_names:
        array = table.column(name).combine_chunks()
        if isinstance(array, pa.ChunkedArray):  # An empty table has no chunk to combine.
            array = pa.concat_arrays(array.chunks) if array.num_chunks else pa.array([], type=array.type)
        if pa.types.is_fixed_size_list(array.type):
            columns[name] = array.flatten().to_numpy(zero_copy_only=False).reshape(len(array), array.type.list_size)
        elif pa.types.is_list(array.type):  # Other writers use plain lists; all rows have one length.
            columns[name] = array.flatten().to_numpy(zero_copy_only=False).reshape(len(array), -1)
        else:
            columns[name] = array.to_numpy(zero_copy_only=False)
    return columns


def _stored_shape(column: Column) -> tuple[int, ...]:
    return () if column.shape == (1,) else column.shape


def _arrow_type(column: Column) -> pa.DataType:
    item = pa.from_numpy_dtype(np.dtype(column.dtype))
    return item if column.shape == (1,) else pa.list_(item, column.shape[0])


def _to_arrow(values: npt.NDArray[Any], column: Column) -> pa.Array:
    if column.shape == (1,):
        return pa.array(values)
    return pa.FixedSizeListArray.from_arrays(pa.array(values.reshape(-1)), type=_arrow_type(column))
