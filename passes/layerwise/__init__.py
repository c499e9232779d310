"""One layer at a time: what it reads as rows, their Gram matrices in one pass, where what was solved for goes."""
