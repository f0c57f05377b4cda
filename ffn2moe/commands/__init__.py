"""The commands of `ffn2moe`: one file each, whose `ROW` is a `Command`. None imports anything heavy at its top."""
