// The Python module: the ops and the runtime. engine.cpp has the rest.
#include <cstdint>
#include <cstdlib>
#include <stdexcept>
#include <string>
#include <vector>

#include "bindings/bindings.h"
#include "bindings/fields.h"
#include "core/isa.h"
#include "core/machine_limits.h"
#include "core/threads.h"
#include "ops/attention.h"
#include "ops/cross_entropy.h"
#include "ops/optim.h"
#include "ops/rms_norm.h"
#include "ops/rope.h"
#include "ops/swiglu.h"

namespace hrmcore::python {
namespace {

void bind_attention(py::module_& m) {
  using Forward = AttentionForward;
  def_op(m, "attention_forward", attention_forward, input("q", &Forward::q), input("k", &Forward::k),
         input("v", &Forward::v), input("gate", &Forward::gate), input("offsets", &Forward::offsets),
         input("key_offsets", &Forward::key_offsets), input("prefix", &Forward::prefix),
         output("out", &Forward::out), output("lse", &Forward::lse),
         optional("log_decay", &Forward::log_decay), input("window", &Forward::window),
         optional("tiles", &Forward::tiles));
  using Backward = AttentionBackward;
  def_op(m, "attention_backward", attention_backward, input("q", &Backward::q), input("k", &Backward::k),
         input("v", &Backward::v), input("gate", &Backward::gate), input("offsets", &Backward::offsets),
         input("key_offsets", &Backward::key_offsets), input("prefix", &Backward::prefix),
         input("out", &Backward::out), input("lse", &Backward::lse), input("grad_out", &Backward::grad_out),
         output("grad_q", &Backward::grad_q), output("grad_k", &Backward::grad_k),
         output("grad_v", &Backward::grad_v), output("grad_gate", &Backward::grad_gate),
         optional("log_decay", &Backward::log_decay), input("window", &Backward::window),
         optional("tiles", &Backward::tiles), optional_output("ungated", &Backward::ungated),
         optional_output("row_terms", &Backward::row_terms), optional("table", &Backward::table),
         optional("positions", &Backward::positions));
  using Table = AttentionTable;
  def_on_cuda<Table>(m, "attention_table", input("offsets", &Table::offsets),
                     input("key_offsets", &Table::key_offsets), input("prefix", &Table::prefix),
                     input("query_rows", &Table::query_rows), input("key_rows", &Table::key_rows),
                     input("window", &Table::window), output("tiles", &Table::tiles));
}

void bind_cross_entropy(py::module_& m) {
  using Forward = CrossEntropyForward;
  def_op(m, "cross_entropy_forward", cross_entropy_forward, input("logits", &Forward::logits),
         input("targets", &Forward::targets), output("losses", &Forward::losses),
         output("lse", &Forward::lse));
  using Backward = CrossEntropyBackward;
  def_op(m, "cross_entropy_backward", cross_entropy_backward, output("logits", &Backward::logits),
         input("targets", &Backward::targets), input("lse", &Backward::lse),
         input("scale", &Backward::scale));
}

void bind_adam(py::module_& m, const char* op, Kernel<AdamStep> kernel) {
  def_optimizer(m, op, kernel, list("params", "param", &StepTensors::param),
                list("grads", "grad", &StepTensors::grad), list("exp_avgs", "exp_avg", &StepTensors::exp_avg),
                list("exp_avg_sqs", "exp_avg_sq", &StepTensors::second),
                list("emas", "ema", &StepTensors::ema), list("steps", "steps", &StepTensors::step),
                input("lr", &AdamStep::lr), input("beta1", &AdamStep::beta1),
                input("beta2", &AdamStep::beta2), input("weight_decay", &AdamStep::weight_decay),
                input("eps", &AdamStep::eps), input("ema_decay", &AdamStep::ema_decay),
                optional("grad_scale", &AdamStep::grad_scale));
}

void bind_optim(py::module_& m) {
  def_optimizer(m, "sophia_step", sophia_step, list("params", "param", &StepTensors::param),
                list("grads", "grad", &StepTensors::grad), list("exp_avgs", "exp_avg", &StepTensors::exp_avg),
                list("hessians", "hessian", &StepTensors::second), list("emas", "ema", &StepTensors::ema),
                output("clipped", &SophiaStep::clipped), input("lr", &SophiaStep::lr),
                input("beta1", &SophiaStep::beta1), input("weight_decay", &SophiaStep::weight_decay),
                input("rho", &SophiaStep::rho), input("batch_tokens", &SophiaStep::batch_tokens),
                input("eps", &SophiaStep::eps), input("ema_decay", &SophiaStep::ema_decay),
                optional("grad_scale", &SophiaStep::grad_scale));
  def_optimizer(m, "sophia_curvature", sophia_curvature,
                list("hessians", "hessian", &CurvatureTensors::hessian),
                list("probes", "probe", &CurvatureTensors::probe),
                list("hvps", "hvp", &CurvatureTensors::hvp), input("beta2", &SophiaCurvature::beta2));
  bind_adam(m, "adamw_step", adamw_step);
  bind_adam(m, "adam_atan2_step", adam_atan2_step);
  bind_adam(m, "adam_atan2_paper_step", adam_atan2_paper_step);
}

void bind_rms_norm(py::module_& m) {
  using Forward = RmsNormForward;
  def_op(m, "rms_norm_forward", rms_norm_forward, input("x", &Forward::x),
         optional("residual", &Forward::residual), output("y", &Forward::y),
         optional_output("sum", &Forward::sum), input("eps", &Forward::eps));
  using Backward = RmsNormBackward;
  def_op(m, "rms_norm_backward", rms_norm_backward, input("u", &Backward::u),
         input("grad_y", &Backward::grad_y), optional("grad_sum", &Backward::grad_sum),
         output("grad_u", &Backward::grad_u), input("eps", &Backward::eps));
}

void bind_rms_norm_inject(py::module_& m) {
  using Forward = RmsNormInjectForward;
  def_op(m, "rms_norm_inject_forward", rms_norm_inject_forward, input("x", &Forward::x),
         input("residual", &Forward::residual), input("injection", &Forward::injection),
         output("state", &Forward::state), output("y", &Forward::y), output("sum", &Forward::sum),
         output("scale", &Forward::scale), input("eps", &Forward::eps));
  using Backward = RmsNormInjectBackward;
  def_op(m, "rms_norm_inject_backward", rms_norm_inject_backward, input("state", &Backward::state),
         input("sum", &Backward::sum), input("scale", &Backward::scale),
         optional("grad_state", &Backward::grad_state), input("grad_y", &Backward::grad_y),
         optional("grad_sum", &Backward::grad_sum), output("grad_u", &Backward::grad_u),
         optional_output("grad_injection", &Backward::grad_injection), input("eps", &Backward::eps));
}

void bind_rope(py::module_& m) {
  def_op(m, "rope", rope, input("q", &Rope::q), input("k", &Rope::k), input("table", &Rope::table),
         input("positions", &Rope::positions), output("q_out", &Rope::q_out), output("k_out", &Rope::k_out),
         input("inverse", &Rope::inverse));
}

void bind_swiglu(py::module_& m) {
  def_op(m, "swiglu_forward", swiglu_forward, input("ab", &SwigluForward::ab),
         output("y", &SwigluForward::y));
  using Backward = SwigluBackward;
  def_op(m, "swiglu_backward", swiglu_backward, input("ab", &Backward::ab),
         input("grad_y", &Backward::grad_y), output("grad_ab", &Backward::grad_ab),
         optional_output("y", &Backward::y));
}

void bind_machine_limits(py::module_& m) {
  def_on_cpu(m, "stream_read", stream_read, input("source", &StreamRead::source),
             output("sums", &StreamRead::sums));
  def_on_cpu(m, "stream_copy", stream_copy, input("source", &StreamCopy::source),
             output("target", &StreamCopy::target));
  def_on_cpu(m, "multiply_add", multiply_add, output("sums", &MultiplyAdd::sums),
             input("rounds", &MultiplyAdd::rounds));
  m.attr("multiply_add_width") = multiply_add_width;
  m.attr("stream_block") = stream_block;
}

void bind_runtime(py::module_& m) {
  m.def("isa", [] { return name(current_isa()); });
  m.def("set_isa", &set_isa, py::arg("name"));
  m.def("supported_isas", [] {
    std::vector<std::string> names;
    for (Isa isa : supported_isas()) names.emplace_back(name(isa));
    return names;
  });
  m.def("emulate_cuda", &emulate_cuda, py::arg("path"));
  m.def("emulating_cuda", &emulating_cuda);
  m.def("num_threads", &num_threads);
  m.def("set_num_threads", &set_num_threads, py::arg("threads"));
  if (const char* forced = std::getenv("HRMCORE_ISA"); forced != nullptr && *forced != '\0') {
    try {
      set_isa(forced);
    } catch (const std::invalid_argument& error) {
      throw py::import_error(std::string("the environment variable HRMCORE_ISA is wrong: ") + error.what());
    }
  }
}

}  // namespace
}  // namespace hrmcore::python

PYBIND11_MODULE(_C, m) {
  using namespace hrmcore::python;
  m.doc() = "hrmcore's kernels. Tensors are DLPack producers; outputs are allocated by the caller.";
  bind_runtime(m);
  bind_machine_limits(m);
  bind_attention(m);
  bind_cross_entropy(m);
  bind_cuda_step(m);
  bind_engine(m);
  bind_optim(m);
  bind_rms_norm(m);
  bind_rms_norm_inject(m);
  bind_rope(m);
  bind_sampler(m);
  bind_swiglu(m);
}
