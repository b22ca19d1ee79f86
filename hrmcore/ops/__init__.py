"""The ops: each module is one op on one page (reference, schema, fake, autograd, cases).

Import an op from its page, `from hrmcore.ops.rms_norm import rms_norm`; the page is also where its cases() are.
"""
