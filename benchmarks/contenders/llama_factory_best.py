"""LLaMA-Factory at its best on a CPU: no recompute, documents packed apart from each other (`neat_packing`)."""

from __future__ import annotations

from typing import Any

from common import Job, read_job
from datasets import Dataset
from llama_factory_sft import train
from llamafactory.data.processor import PackedSupervisedDatasetProcessor
from llamafactory.hparams import DataArguments
from transformers import AutoTokenizer


class Packer(PackedSupervisedDatasetProcessor):  # type: ignore[misc]
    """Its packer, which is given documents as (token ids, labels) where it would have texts to encode."""

    def _encode_data_example(self, prompt: Any, response: Any, **others: Any) -> tuple[list[int], list[int]]:
        return prompt[0], response[0]


def packed(job: Job, cutoff: int) -> Dataset:
    """All frozen documents in its rows of `cutoff` positions, padding included."""
    given = DataArguments(cutoff_len=cutoff, neat_packing=True)
    packer = Packer(template=None, tokenizer=AutoTokenizer.from_pretrained(job.model_dir), processor=None, data_args=given)
    nothing = [None] * len(job.pool)
    columns = dict.fromkeys(("_system", "_tools", "_images", "_videos", "_audios"), nothing)
    texts = {"_prompt": [[d.input_ids] for d in job.pool], "_response": [[d.labels] for d in job.pool]}
    return Dataset.from_dict(packer.preprocess_dataset(columns | texts))


def main() -> None:
    job = read_job()
    cutoff = job.max_length + 8  # the next multiple of 8 that leaves room for the longest document and its end
    options = {"cutoff_len": cutoff, "neat_packing": True, "disable_gradient_checkpointing": True, "disable_shuffling": False}
    train(job, packed(job, cutoff), per_device_train_batch_size=1, **options)


if __name__ == "__main__":
    main()
