// The Python module: the ops and the runtime. engine.cpp has the rest.
#include <cstdint>
#include <cstdlib>
#include <stdexcept>
#include <string>
#include <vector>

#include "bindings/bindings.h"
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
  m.def(
      "attention_forward",
      [](const py::object& q, const py::object& k, const py::object& v, const py::object& gate,
         const py::object& offsets, const py::object& key_offsets, const py::object& prefix,
         const py::object& out, const py::object& lse, const py::object& log_decay, std::int64_t window,
         std::uintptr_t stream) {
        DlpackArgs b("attention_forward");
        const AttentionForward args{b.view(q, "q"),
                                    b.view(k, "k"),
                                    b.view(v, "v"),
                                    b.view(gate, "gate"),
                                    b.view(offsets, "offsets"),
                                    b.view(key_offsets, "key_offsets"),
                                    b.view(prefix, "prefix"),
                                    b.view(out, "out"),
                                    b.view(lse, "lse"),
                                    b.optional(log_decay, "log_decay"),
                                    window};
        run(b, stream, args, attention_forward);
      },
      py::arg("q"), py::arg("k"), py::arg("v"), py::arg("gate"), py::arg("offsets"), py::arg("key_offsets"),
      py::arg("prefix"), py::arg("out"), py::arg("lse"), py::arg("log_decay"), py::arg("window"),
      py::arg("stream") = 0);
  m.def(
      "attention_backward",
      [](const py::object& q, const py::object& k, const py::object& v, const py::object& gate,
         const py::object& offsets, const py::object& key_offsets, const py::object& prefix,
         const py::object& out, const py::object& lse, const py::object& grad_out, const py::object& grad_q,
         const py::object& grad_k, const py::object& grad_v, const py::object& grad_gate,
         const py::object& log_decay, std::int64_t window, std::uintptr_t stream) {
        DlpackArgs b("attention_backward");
        const AttentionBackward args{b.view(q, "q"),
                                     b.view(k, "k"),
                                     b.view(v, "v"),
                                     b.view(gate, "gate"),
                                     b.view(offsets, "offsets"),
                                     b.view(key_offsets, "key_offsets"),
                                     b.view(prefix, "prefix"),
                                     b.view(out, "out"),
                                     b.view(lse, "lse"),
                                     b.view(grad_out, "grad_out"),
                                     b.view(grad_q, "grad_q"),
                                     b.view(grad_k, "grad_k"),
                                     b.view(grad_v, "grad_v"),
                                     b.view(grad_gate, "grad_gate"),
                                     b.optional(log_decay, "log_decay"),
                                     window};
        run(b, stream, args, attention_backward);
      },
      py::arg("q"), py::arg("k"), py::arg("v"), py::arg("gate"), py::arg("offsets"), py::arg("key_offsets"),
      py::arg("prefix"), py::arg("out"), py::arg("lse"), py::arg("grad_out"), py::arg("grad_q"),
      py::arg("grad_k"), py::arg("grad_v"), py::arg("grad_gate"), py::arg("log_decay"), py::arg("window"),
      py::arg("stream") = 0);
}

void bind_cross_entropy(py::module_& m) {
  m.def(
      "cross_entropy_forward",
      [](const py::object& logits, const py::object& targets, const py::object& losses, const py::object& lse,
         std::uintptr_t stream) {
        DlpackArgs b("cross_entropy_forward");
        const CrossEntropyForward args{b.view(logits, "logits"), b.view(targets, "targets"),
                                       b.view(losses, "losses"), b.view(lse, "lse")};
        run(b, stream, args, cross_entropy_forward);
      },
      py::arg("logits"), py::arg("targets"), py::arg("losses"), py::arg("lse"), py::arg("stream") = 0);
  m.def(
      "cross_entropy_backward",
      [](const py::object& logits, const py::object& targets, const py::object& lse, double scale,
         std::uintptr_t stream) {
        DlpackArgs b("cross_entropy_backward");
        const CrossEntropyBackward args{b.view(logits, "logits"), b.view(targets, "targets"),
                                        b.view(lse, "lse"), scale};
        run(b, stream, args, cross_entropy_backward);
      },
      py::arg("logits"), py::arg("targets"), py::arg("lse"), py::arg("scale"), py::arg("stream") = 0);
}

// The lists of tensors that an optimizer's call brings: one tensor of each belongs to one parameter,
// `numbers` says which for errors.
class TensorLists {
 public:
  using List = std::vector<py::object>;

  TensorLists(DlpackArgs& operands, const std::vector<std::int64_t>& numbers)
      : operands_(operands), numbers_(numbers) {}

  std::size_t count() const { return numbers_.size(); }
  std::int64_t number(std::size_t i) const { return numbers_[i]; }

  TensorView at(const List& list, std::size_t i, const char* argument) {
    if (list.size() != count()) {
      reject(operands_.op(), argument, "a list of " + std::to_string(count()), std::to_string(list.size()));
    }
    try {
      return operands_.optional(list[i], argument);
    } catch (const std::invalid_argument& error) {
      throw std::invalid_argument("parameter " + std::to_string(numbers_[i]) + ": " + error.what());
    }
  }

 private:
  DlpackArgs& operands_;
  const std::vector<std::int64_t>& numbers_;
};

std::vector<StepTensors> step_tensors(TensorLists& lists, const TensorLists::List& params,
                                      const TensorLists::List& grads, const TensorLists::List& exp_avgs,
                                      const TensorLists::List& seconds, const char* second,
                                      const TensorLists::List& emas) {
  std::vector<StepTensors> tensors(lists.count());
  for (std::size_t i = 0; i < tensors.size(); ++i) {
    StepTensors& t = tensors[i];
    t.param = lists.at(params, i, "param");
    t.grad = lists.at(grads, i, "grad");
    t.exp_avg = lists.at(exp_avgs, i, "exp_avg");
    t.second = lists.at(seconds, i, second);
    t.ema = lists.at(emas, i, "ema");
    t.number = lists.number(i);
  }
  return tensors;
}

void bind_optim(py::module_& m) {
  using List = TensorLists::List;
  using Numbers = std::vector<std::int64_t>;
  m.def(
      "sophia_step",
      [](const Numbers& numbers, const List& params, const List& grads, const List& exp_avgs,
         const List& hessians, const List& emas, const py::object& clipped, double lr, double beta1,
         double weight_decay, double rho, double batch_tokens, double eps, double ema_decay,
         std::uintptr_t stream) {
        DlpackArgs b("sophia_step");
        TensorLists lists(b, numbers);
        const auto tensors = step_tensors(lists, params, grads, exp_avgs, hessians, "hessian", emas);
        const auto count = static_cast<std::int64_t>(tensors.size());
        const SophiaStep args{tensors.data(),
                              count,
                              b.view(clipped, "clipped"),
                              lr,
                              beta1,
                              weight_decay,
                              rho,
                              batch_tokens,
                              eps,
                              ema_decay};
        run(b, stream, args, sophia_step);
      },
      py::arg("numbers"), py::arg("params"), py::arg("grads"), py::arg("exp_avgs"), py::arg("hessians"),
      py::arg("emas"), py::arg("clipped"), py::arg("lr"), py::arg("beta1"), py::arg("weight_decay"),
      py::arg("rho"), py::arg("batch_tokens"), py::arg("eps"), py::arg("ema_decay"), py::arg("stream") = 0);
  m.def(
      "sophia_curvature",
      [](const Numbers& numbers, const List& hessians, const List& probes, const List& hvps, double beta2,
         std::uintptr_t stream) {
        DlpackArgs b("sophia_curvature");
        TensorLists lists(b, numbers);
        std::vector<CurvatureTensors> tensors(lists.count());
        for (std::size_t i = 0; i < tensors.size(); ++i) {
          tensors[i] = {lists.at(hessians, i, "hessian"), lists.at(probes, i, "probe"),
                        lists.at(hvps, i, "hvp"), lists.number(i)};
        }
        const SophiaCurvature args{tensors.data(), static_cast<std::int64_t>(tensors.size()), beta2};
        run(b, stream, args, sophia_curvature);
      },
      py::arg("numbers"), py::arg("hessians"), py::arg("probes"), py::arg("hvps"), py::arg("beta2"),
      py::arg("stream") = 0);
  const auto bind_adam = [&m](const char* op, void (*kernel)(const AdamStep&) noexcept) {
    m.def(
        op,
        [op, kernel](const Numbers& numbers, const List& params, const List& grads, const List& exp_avgs,
                     const List& exp_avg_sqs, const List& emas, const Numbers& steps, double lr, double beta1,
                     double beta2, double weight_decay, double eps, double ema_decay, std::uintptr_t stream) {
          DlpackArgs b(op);
          TensorLists lists(b, numbers);
          auto tensors = step_tensors(lists, params, grads, exp_avgs, exp_avg_sqs, "exp_avg_sq", emas);
          if (steps.size() != tensors.size()) {
            reject(op, "steps", "a list of " + std::to_string(tensors.size()), std::to_string(steps.size()));
          }
          for (std::size_t i = 0; i < tensors.size(); ++i) tensors[i].step = steps[i];
          const auto count = static_cast<std::int64_t>(tensors.size());
          run(b, stream, AdamStep{tensors.data(), count, lr, beta1, beta2, weight_decay, eps, ema_decay},
              kernel);
        },
        py::arg("numbers"), py::arg("params"), py::arg("grads"), py::arg("exp_avgs"), py::arg("exp_avg_sqs"),
        py::arg("emas"), py::arg("steps"), py::arg("lr"), py::arg("beta1"), py::arg("beta2"),
        py::arg("weight_decay"), py::arg("eps"), py::arg("ema_decay"), py::arg("stream") = 0);
  };
  bind_adam("adamw_step", adamw_step);
  bind_adam("adam_atan2_step", adam_atan2_step);
}

void bind_rms_norm(py::module_& m) {
  m.def(
      "rms_norm_forward",
      [](const py::object& x, const py::object& residual, const py::object& y, const py::object& sum,
         double eps, std::uintptr_t stream) {
        DlpackArgs b("rms_norm_forward");
        const RmsNormForward args{b.view(x, "x"), b.optional(residual, "residual"), b.view(y, "y"),
                                  b.optional(sum, "sum"), eps};
        run(b, stream, args, rms_norm_forward);
      },
      py::arg("x"), py::arg("residual"), py::arg("y"), py::arg("sum"), py::arg("eps"), py::arg("stream") = 0);
  m.def(
      "rms_norm_backward",
      [](const py::object& u, const py::object& grad_y, const py::object& grad_sum, const py::object& grad_u,
         double eps, std::uintptr_t stream) {
        DlpackArgs b("rms_norm_backward");
        const RmsNormBackward args{b.view(u, "u"), b.view(grad_y, "grad_y"), b.optional(grad_sum, "grad_sum"),
                                   b.view(grad_u, "grad_u"), eps};
        run(b, stream, args, rms_norm_backward);
      },
      py::arg("u"), py::arg("grad_y"), py::arg("grad_sum"), py::arg("grad_u"), py::arg("eps"),
      py::arg("stream") = 0);
}

void bind_rms_norm_inject(py::module_& m) {
  m.def(
      "rms_norm_inject_forward",
      [](const py::object& x, const py::object& residual, const py::object& injection,
         const py::object& state, const py::object& y, const py::object& sum, const py::object& scale,
         double eps, std::uintptr_t stream) {
        DlpackArgs b("rms_norm_inject_forward");
        const RmsNormInjectForward args{b.view(x, "x"),
                                        b.view(residual, "residual"),
                                        b.view(injection, "injection"),
                                        b.view(state, "state"),
                                        b.view(y, "y"),
                                        b.view(sum, "sum"),
                                        b.view(scale, "scale"),
                                        eps};
        run(b, stream, args, rms_norm_inject_forward);
      },
      py::arg("x"), py::arg("residual"), py::arg("injection"), py::arg("state"), py::arg("y"), py::arg("sum"),
      py::arg("scale"), py::arg("eps"), py::arg("stream") = 0);
  m.def(
      "rms_norm_inject_backward",
      [](const py::object& state, const py::object& sum, const py::object& scale,
         const py::object& grad_state, const py::object& grad_y, const py::object& grad_sum,
         const py::object& grad_u, const py::object& grad_injection, double eps, std::uintptr_t stream) {
        DlpackArgs b("rms_norm_inject_backward");
        const RmsNormInjectBackward args{b.view(state, "state"),
                                         b.view(sum, "sum"),
                                         b.view(scale, "scale"),
                                         b.optional(grad_state, "grad_state"),
                                         b.view(grad_y, "grad_y"),
                                         b.optional(grad_sum, "grad_sum"),
                                         b.view(grad_u, "grad_u"),
                                         b.optional(grad_injection, "grad_injection"),
                                         eps};
        run(b, stream, args, rms_norm_inject_backward);
      },
      py::arg("state"), py::arg("sum"), py::arg("scale"), py::arg("grad_state"), py::arg("grad_y"),
      py::arg("grad_sum"), py::arg("grad_u"), py::arg("grad_injection"), py::arg("eps"),
      py::arg("stream") = 0);
}

void bind_rope(py::module_& m) {
  m.def(
      "rope",
      [](const py::object& q, const py::object& k, const py::object& table, const py::object& positions,
         const py::object& q_out, const py::object& k_out, bool inverse, std::uintptr_t stream) {
        DlpackArgs b("rope");
        const Rope args{b.view(q, "q"),
                        b.view(k, "k"),
                        b.view(table, "table"),
                        b.view(positions, "positions"),
                        b.view(q_out, "q_out"),
                        b.view(k_out, "k_out"),
                        inverse};
        run(b, stream, args, rope);
      },
      py::arg("q"), py::arg("k"), py::arg("table"), py::arg("positions"), py::arg("q_out"), py::arg("k_out"),
      py::arg("inverse"), py::arg("stream") = 0);
}

void bind_swiglu(py::module_& m) {
  m.def(
      "swiglu_forward",
      [](const py::object& ab, const py::object& y, std::uintptr_t stream) {
        DlpackArgs b("swiglu_forward");
        const SwigluForward args{b.view(ab, "ab"), b.view(y, "y")};
        run(b, stream, args, swiglu_forward);
      },
      py::arg("ab"), py::arg("y"), py::arg("stream") = 0);
  m.def(
      "swiglu_backward",
      [](const py::object& ab, const py::object& grad_y, const py::object& grad_ab, const py::object& y,
         std::uintptr_t stream) {
        DlpackArgs b("swiglu_backward");
        const SwigluBackward args{b.view(ab, "ab"), b.view(grad_y, "grad_y"), b.view(grad_ab, "grad_ab"),
                                  b.optional(y, "y")};
        run(b, stream, args, swiglu_backward);
      },
      py::arg("ab"), py::arg("grad_y"), py::arg("grad_ab"), py::arg("y"), py::arg("stream") = 0);
}

void bind_machine_limits(py::module_& m) {
  m.def("stream_read", [](const py::object& source, const py::object& sums) {
    DlpackArgs b("stream_read");
    run<StreamRead>({b.view(source, "source"), b.view(sums, "sums")}, stream_read);
  });
  m.def("stream_copy", [](const py::object& source, const py::object& target) {
    DlpackArgs b("stream_copy");
    run<StreamCopy>({b.view(source, "source"), b.view(target, "target")}, stream_copy);
  });
  m.def("multiply_add", [](const py::object& sums, std::int64_t rounds) {
    DlpackArgs b("multiply_add");
    run<MultiplyAdd>({b.view(sums, "sums"), rounds}, multiply_add);
  });
  m.attr("multiply_add_width") = multiply_add_width;
  m.attr("stream_block") = stream_block;
}

void bind_runtime(py::module_& m) {
  m.def("isa", [] { return name(current_isa()); });
  m.def("set_isa", &set_isa);
  m.def("supported_isas", [] {
    std::vector<std::string> names;
    for (Isa isa : supported_isas()) names.emplace_back(name(isa));
    return names;
  });
  m.def("emulate_cuda", &emulate_cuda);
  m.def("num_threads", &num_threads);
  m.def("set_num_threads", &set_num_threads);
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
