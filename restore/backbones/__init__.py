"""Networks that predict eps."""

import logging


def _hide(logger: str, text: str) -> None:
    logging.getLogger(logger).addFilter(lambda record: text not in str(record.msg))


# Where torchao is installed, diffusers imports it with any network. What is said then is a deprecated call of torchao's
# own, and that pickles of its older versions cannot be read; nothing here reads them.
_hide("torch.utils._pytree", "register_constant")
_hide("diffusers.quantizers.torchao.torchao_quantizer", "Unable to import `torchao` Tensor objects")
