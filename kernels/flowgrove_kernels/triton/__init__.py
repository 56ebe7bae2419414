"""The ops as Triton kernels, imported when that backend first runs: one file per op,
registered as `implements(op, "triton")`.

    launch       how a row is cut into blocks, and the options that every launch has
    element      what one block of elements goes through: loads, μ, residual, sums whose order is written out;
                 and checks of what only the device sees
    normal       noise drawn in registers
    combine      sums of blocks → sums of rows, and the log-probability
    gradient     the gradient in the velocity, shared by flow_logprob and grpo_loss

A program handles one block of one parent and loops over its children, so x, v and history are read once for all of
them. The order of every sum follows from the row length alone; nothing is tuned at run time, nothing is added
atomically. TRITON_INTERPRET=1 runs the same kernels on CPU tensors.
"""

import flowgrove_kernels.triton.clean_estimate
import flowgrove_kernels.triton.flow_logprob
import flowgrove_kernels.triton.flow_step
import flowgrove_kernels.triton.grpo_loss
import flowgrove_kernels.triton.philox_normal  # noqa: F401
