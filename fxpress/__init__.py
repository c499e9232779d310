"""fxpress: makes a trained CNN several times smaller and faster, and proves what it cost."""
