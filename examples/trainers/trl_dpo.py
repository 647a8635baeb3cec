"""TRL's DPOTrainer with the fused head: the one line that is ours is the last but one."""

from datasets import load_dataset
from trl import DPOConfig, DPOTrainer

from svpo_kernels.integrations.trl import use_fused_head

if __name__ == "__main__":
    rows = load_dataset("trl-lib/ultrafeedback_binarized", split="train")
    trainer = DPOTrainer("Qwen/Qwen2.5-0.5B-Instruct", args=DPOConfig("out"), train_dataset=rows)
    use_fused_head(trainer)
    trainer.train()
