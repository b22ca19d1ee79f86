"""Records in, packed PrefixLM batches out; the public names. Imports no torch."""

from __future__ import annotations

from typing import TYPE_CHECKING

from hrmcore._lazy import lazy

if TYPE_CHECKING:
    from hrmcore.data.packing import BatchStream as BatchStream
    from hrmcore.data.packing import PackedBatch as PackedBatch
    from hrmcore.data.packing import epoch_batches as epoch_batches
    from hrmcore.data.packing import pack as pack
    from hrmcore.data.packing import share as share
    from hrmcore.data.records import Corpus as Corpus
    from hrmcore.data.records import Fault as Fault
    from hrmcore.data.records import Record as Record
    from hrmcore.data.records import Rejected as Rejected
    from hrmcore.data.records import encode as encode
    from hrmcore.data.records import parse_record as parse_record
    from hrmcore.data.records import read_records as read_records
    from hrmcore.data.records import tokenize as tokenize
    from hrmcore.data.store import Store as Store
    from hrmcore.data.store import load_corpus as load_corpus
    from hrmcore.data.store import open_store as open_store

__getattr__, __dir__ = lazy(
    __name__,
    {
        "packing": ["BatchStream", "PackedBatch", "epoch_batches", "pack", "share"],
        "records": ["Corpus", "Fault", "Record", "Rejected", "encode", "parse_record", "read_records", "tokenize"],
        "store": ["Store", "load_corpus", "open_store"],
    },
)
