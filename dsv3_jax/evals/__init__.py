"""What a trained model can do: bits per byte, multiple choice, written answers, needles.

Each file takes an `infer.generate.Generator` and a tokenizer and returns plain numbers;
`dsv3 eval` reads what to ask, and shows what came of it.
"""
