"""Post-training: supervised fine-tuning, rewards, GRPO, distillation (report 5)."""
