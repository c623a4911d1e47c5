"""The claims of LaVIT and ILLUME as experiments at the size `laptop`; docs/claims.md says what is expected of each.

Run one with python -m benchmarks.claims.NAME --output=DIRECTORY: `semantic_tokenizer`, `joint_training`,
`dynamic_tokens` or `self_assessment`. The other files are parts of them.
"""
