"""Many runs of one recipe: `settings` and `search` give them, `runs` trains them, `results` compares them."""
