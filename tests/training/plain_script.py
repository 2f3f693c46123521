"""A user's fine-tuning script as the library's own examples have it. It has never heard of this project."""

import json
import sys

import numpy as np
from datasets import load_dataset
from sacrebleu.metrics import BLEU
from transformers import (
    AutoModelForSeq2SeqLM,
    AutoTokenizer,
    DataCollatorForSeq2Seq,
    Seq2SeqTrainer,
    Seq2SeqTrainingArguments,
    set_seed,
)


def main(checkpoint: str, data: str, output: str) -> None:
    set_seed(0)
    tokenizer = AutoTokenizer.from_pretrained(checkpoint)
    model = AutoModelForSeq2SeqLM.from_pretrained(checkpoint, trust_remote_code=True)
    texts = load_dataset("json", data_files={"train": data, "validation": data})
    columns = texts["train"].column_names

    def tokenize(batch):
        return tokenizer(batch["source"], text_target=batch["target"], truncation=True, max_length=32)

    tokenized = texts.map(tokenize, batched=True, remove_columns=columns)

    def compute_metrics(prediction):
        ids = np.where(prediction.predictions < 0, tokenizer.pad_token_id, prediction.predictions)
        labels = np.where(prediction.label_ids < 0, tokenizer.pad_token_id, prediction.label_ids)
        hypotheses = tokenizer.batch_decode(ids, skip_special_tokens=True)
        references = tokenizer.batch_decode(labels, skip_special_tokens=True)
        return {"bleu": BLEU(effective_order=True).corpus_score(hypotheses, [references]).score}

    arguments = Seq2SeqTrainingArguments(
        output,
        max_steps=120,
        learning_rate=5e-3,
        warmup_steps=10,
        per_device_train_batch_size=8,
        gradient_accumulation_steps=2,
        per_device_eval_batch_size=16,
        predict_with_generate=True,
        generation_max_length=32,
        eval_strategy="steps",
        eval_steps=40,
        save_steps=40,
        logging_steps=40,
        load_best_model_at_end=True,
        metric_for_best_model="bleu",
        report_to="none",
        use_cpu=True,
    )
    trainer = Seq2SeqTrainer(
        model=model,
        args=arguments,
        train_dataset=tokenized["train"],
        eval_dataset=tokenized["validation"],
        data_collator=DataCollatorForSeq2Seq(tokenizer, model=model),
        processing_class=tokenizer,
        compute_metrics=compute_metrics,
    )
    before = trainer.evaluate()
    trainer.train()
    after = trainer.evaluate()
    trainer.save_model(f"{output}/final")
    again = AutoModelForSeq2SeqLM.from_pretrained(f"{output}/final", trust_remote_code=True)
    inputs = tokenizer(texts["train"]["source"][:4], padding=True, return_tensors="pt")
    same = model.eval().generate(**inputs).tolist() == again.generate(**inputs).tolist()
    print(json.dumps({"before": before, "after": after, "same": same, "log": trainer.state.log_history}))


if __name__ == "__main__":
    main(*sys.argv[1:])
