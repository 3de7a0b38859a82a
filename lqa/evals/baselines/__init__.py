"""What a decoder is compared with: ways to read one activation that need no decoder, each after its paper.

    patchscopes   the activation in the place of a word of another prompt, which the same model goes on with
    selfie        the activation in five places of a request to summarise them
    logit_lens    the activation through the model's last norm and unembedding
    probe         a linear classifier, trained on labelled activations of the same kind

The first three read what is in the state without training; the probe says what a linear reader could find if it was told what to look for.

And what a steering is compared with (lqa.evals.methods makes them, beside the control as system prompt):

    caa           a contrastive activation addition
    imitation     SFT and DPO of an equal LoRA on the target's own replies under the control
"""
