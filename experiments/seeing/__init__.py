"""The parts of `contrastive_study`, `document_study` and `demo_vision`."""
