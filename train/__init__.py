"""Training decoders with TRL's SFTTrainer.  `python -m train.decoder --config train/configs/NAME.yaml` is the entry point."""
