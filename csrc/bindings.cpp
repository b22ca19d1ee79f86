// The only pybind11 file: DLPack tensors to TensorView, checks with the GIL held, kernels with it released.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <cstdint>
#include <cstdlib>
#include <exception>
#include <memory>
#include <mutex>
#include <stdexcept>
#include <string>
#include <vector>

#include "core/device.h"
#include "core/isa.h"
#include "core/machine_limits.h"
#include "core/tensor.h"
#include "core/threads.h"
#include "engine/cuda_step.h"
#include "engine/engine.h"
#include "engine/sampler.h"
#include "ops/attention.h"
#include "ops/cross_entropy.h"
#include "ops/optim.h"
#include "ops/rms_norm.h"
#include "ops/rope.h"
#include "ops/swiglu.h"

namespace py = pybind11;

namespace {

// The part of the DLPack ABI (dlpack.h, version 0.8) that is read here.
struct DlTensor {
  void* data;
  std::int32_t device_type;
  std::int32_t device_id;
  std::int32_t ndim;
  std::uint8_t type_code;
  std::uint8_t type_bits;
  std::uint16_t type_lanes;
  std::int64_t* shape;
  std::int64_t* strides;
  std::uint64_t byte_offset;
};

hrmcore::DType dtype_of(const DlTensor& t) {
  using hrmcore::DType;
  enum : std::uint8_t { signed_integer = 0, unsigned_integer = 1, floating = 2, bfloat = 4 };
  if (t.type_lanes != 1) return DType::other;
  if (t.type_code == floating && t.type_bits == 32) return DType::f32;
  if (t.type_code == floating && t.type_bits == 64) return DType::f64;
  if (t.type_code == bfloat && t.type_bits == 16) return DType::bf16;
  if (t.type_code == signed_integer && t.type_bits == 8) return DType::i8;
  if (t.type_code == unsigned_integer && t.type_bits == 8) return DType::u8;
  if (t.type_code == unsigned_integer && t.type_bits == 16) return DType::u16;
  if (t.type_code == signed_integer && t.type_bits == 32) return DType::i32;
  if (t.type_code == signed_integer && t.type_bits == 64) return DType::i64;
  return DType::other;
}

// Borrows the tensors of one call: the capsules live, unconsumed, until it returns.
class Borrowed {
 public:
  explicit Borrowed(const char* op) : op_(op) {}

  hrmcore::TensorView view(const py::object& array, const char* argument) {
    py::object capsule = array;
    if (!PyCapsule_CheckExact(array.ptr())) {
      if (!py::hasattr(array, "__dlpack__")) {
        hrmcore::reject(op_, argument, "a tensor (any DLPack producer)", py::str(py::type::of(array)));
      }
      capsule = exported(array, argument);
    }
    const auto* t = static_cast<const DlTensor*>(PyCapsule_GetPointer(capsule.ptr(), "dltensor"));
    if (t == nullptr) {
      PyErr_Clear();
      hrmcore::reject(op_, argument, "a DLPack capsule that nobody has consumed", "one of another kind");
    }
    if (t->ndim > hrmcore::TensorView::max_rank) {
      hrmcore::reject(op_, argument, "of rank 6 at most", "rank " + std::to_string(t->ndim));
    }
    hrmcore::TensorView v;
    v.data = static_cast<char*>(t->data) + t->byte_offset;
    if (t->type_bits >= 8 && reinterpret_cast<std::uintptr_t>(v.data) % (t->type_bits / 8) != 0) {
      hrmcore::reject(op_, argument, "aligned to its element size", "a misaligned view");
    }
    v.rank = t->ndim;
    v.dtype = dtype_of(*t);
    constexpr std::int32_t dl_cpu = 1, dl_cuda = 2;
    v.device = t->device_type == dl_cpu    ? hrmcore::Device::cpu
               : t->device_type == dl_cuda ? hrmcore::Device::cuda
                                           : hrmcore::Device::other;
    std::int64_t packed = 1;
    for (int axis = t->ndim - 1; axis >= 0; --axis) {
      v.shape[axis] = t->shape[axis];
      v.strides[axis] = t->strides != nullptr ? t->strides[axis] : packed;
      packed *= t->shape[axis];
    }
    if (!capsules_.empty() && v.device != device_) {
      hrmcore::reject(op_, argument, "on the device of the operands before it", "a tensor on another device");
    }
    device_ = v.device;
    capsules_.push_back(std::move(capsule));
    return v;
  }

  const char* op() const { return op_; }
  hrmcore::Device device() const { return device_; }  // of all operands

  hrmcore::TensorView optional(const py::object& array, const char* argument) {
    return array.is_none() ? hrmcore::TensorView{} : view(array, argument);
  }

 private:
  py::object exported(const py::object& array, const char* argument) const {
    try {
      return array.attr("__dlpack__")();
    } catch (const py::error_already_set& error) {
      hrmcore::reject(op_, argument, "an array that can be exported through DLPack", error.what());
    }
  }

  const char* op_;
  hrmcore::Device device_ = hrmcore::Device::cpu;
  std::vector<py::object> capsules_;
};

template <class Args>
void run(const Args& args, void (*kernel)(const Args&) noexcept) {
  check(args);
  py::gil_scoped_release unlocked;
  kernel(args);
}

template <class Args>
void run_on_cuda(const Borrowed& borrowed, std::uintptr_t stream, const Args& args) {
  using Launch = const char* (*)(const Args&, void*);
  const auto launch = reinterpret_cast<Launch>(hrmcore::device_kernel(borrowed.op()));
  const char* error = nullptr;
  {
    py::gil_scoped_release unlocked;
    error = launch(args, reinterpret_cast<void*>(stream));
  }
  if (error != nullptr) throw std::runtime_error(std::string(borrowed.op()) + " on CUDA: " + error);
}

// The same for an op that has CUDA kernels: runs where its operands are, on CUDA in the order of the stream.
template <class Args>
void run(const Borrowed& borrowed, std::uintptr_t stream, const Args& args,
         void (*kernel)(const Args&) noexcept) {
  check(args);
  if (borrowed.device() != hrmcore::Device::cpu || hrmcore::emulating_cuda()) {
    run_on_cuda(borrowed, stream, args);
    return;
  }
  py::gil_scoped_release unlocked;
  kernel(args);
}

void bind_attention(py::module_& m) {
  m.def(
      "attention_forward",
      [](const py::object& q, const py::object& k, const py::object& v, const py::object& gate,
         const py::object& offsets, const py::object& key_offsets, const py::object& prefix,
         const py::object& out, const py::object& lse, const py::object& rates, std::int64_t window,
         std::uintptr_t stream) {
        Borrowed b("attention_forward");
        const hrmcore::AttentionForward args{b.view(q, "q"),
                                             b.view(k, "k"),
                                             b.view(v, "v"),
                                             b.view(gate, "gate"),
                                             b.view(offsets, "offsets"),
                                             b.view(key_offsets, "key_offsets"),
                                             b.view(prefix, "prefix"),
                                             b.view(out, "out"),
                                             b.view(lse, "lse"),
                                             b.optional(rates, "rates"),
                                             window};
        run(b, stream, args, hrmcore::attention_forward);
      },
      py::arg("q"), py::arg("k"), py::arg("v"), py::arg("gate"), py::arg("offsets"), py::arg("key_offsets"),
      py::arg("prefix"), py::arg("out"), py::arg("lse"), py::arg("rates"), py::arg("window"),
      py::arg("stream") = 0);
  m.def(
      "attention_backward",
      [](const py::object& q, const py::object& k, const py::object& v, const py::object& gate,
         const py::object& offsets, const py::object& key_offsets, const py::object& prefix,
         const py::object& out, const py::object& lse, const py::object& grad_out, const py::object& grad_q,
         const py::object& grad_k, const py::object& grad_v, const py::object& grad_gate,
         const py::object& rates, std::int64_t window, std::uintptr_t stream) {
        Borrowed b("attention_backward");
        const hrmcore::AttentionBackward args{b.view(q, "q"),
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
                                              b.optional(rates, "rates"),
                                              window};
        run(b, stream, args, hrmcore::attention_backward);
      },
      py::arg("q"), py::arg("k"), py::arg("v"), py::arg("gate"), py::arg("offsets"), py::arg("key_offsets"),
      py::arg("prefix"), py::arg("out"), py::arg("lse"), py::arg("grad_out"), py::arg("grad_q"),
      py::arg("grad_k"), py::arg("grad_v"), py::arg("grad_gate"), py::arg("rates"), py::arg("window"),
      py::arg("stream") = 0);
}

void bind_cross_entropy(py::module_& m) {
  m.def(
      "cross_entropy_forward",
      [](const py::object& logits, const py::object& targets, const py::object& losses, const py::object& lse,
         std::uintptr_t stream) {
        Borrowed b("cross_entropy_forward");
        const hrmcore::CrossEntropyForward args{b.view(logits, "logits"), b.view(targets, "targets"),
                                                b.view(losses, "losses"), b.view(lse, "lse")};
        run(b, stream, args, hrmcore::cross_entropy_forward);
      },
      py::arg("logits"), py::arg("targets"), py::arg("losses"), py::arg("lse"), py::arg("stream") = 0);
  m.def(
      "cross_entropy_backward",
      [](const py::object& logits, const py::object& targets, const py::object& lse, double scale,
         std::uintptr_t stream) {
        Borrowed b("cross_entropy_backward");
        const hrmcore::CrossEntropyBackward args{b.view(logits, "logits"), b.view(targets, "targets"),
                                                 b.view(lse, "lse"), scale};
        run(b, stream, args, hrmcore::cross_entropy_backward);
      },
      py::arg("logits"), py::arg("targets"), py::arg("lse"), py::arg("scale"), py::arg("stream") = 0);
}

// The lists of tensors that an optimizer's call brings: one tensor of each belongs to one parameter,
// `numbers` says which for errors.
class TensorLists {
 public:
  using List = std::vector<py::object>;

  TensorLists(Borrowed& borrowed, const std::vector<std::int64_t>& numbers)
      : borrowed_(borrowed), numbers_(numbers) {}

  std::size_t count() const { return numbers_.size(); }
  std::int64_t number(std::size_t i) const { return numbers_[i]; }

  hrmcore::TensorView at(const List& list, std::size_t i, const char* argument) {
    if (list.size() != count()) {
      hrmcore::reject(borrowed_.op(), argument, "a list of " + std::to_string(count()),
                      std::to_string(list.size()));
    }
    try {
      return borrowed_.optional(list[i], argument);
    } catch (const std::invalid_argument& error) {
      throw std::invalid_argument("parameter " + std::to_string(numbers_[i]) + ": " + error.what());
    }
  }

 private:
  Borrowed& borrowed_;
  const std::vector<std::int64_t>& numbers_;
};

std::vector<hrmcore::StepTensors> step_tensors(TensorLists& lists, const TensorLists::List& params,
                                               const TensorLists::List& grads,
                                               const TensorLists::List& exp_avgs,
                                               const TensorLists::List& seconds, const char* second,
                                               const TensorLists::List& emas) {
  std::vector<hrmcore::StepTensors> tensors(lists.count());
  for (std::size_t i = 0; i < tensors.size(); ++i) {
    hrmcore::StepTensors& t = tensors[i];
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
        Borrowed b("sophia_step");
        TensorLists lists(b, numbers);
        const auto tensors = step_tensors(lists, params, grads, exp_avgs, hessians, "hessian", emas);
        const auto count = static_cast<std::int64_t>(tensors.size());
        const hrmcore::SophiaStep args{tensors.data(),
                                       count,
                                       b.view(clipped, "clipped"),
                                       lr,
                                       beta1,
                                       weight_decay,
                                       rho,
                                       batch_tokens,
                                       eps,
                                       ema_decay};
        run(b, stream, args, hrmcore::sophia_step);
      },
      py::arg("numbers"), py::arg("params"), py::arg("grads"), py::arg("exp_avgs"), py::arg("hessians"),
      py::arg("emas"), py::arg("clipped"), py::arg("lr"), py::arg("beta1"), py::arg("weight_decay"),
      py::arg("rho"), py::arg("batch_tokens"), py::arg("eps"), py::arg("ema_decay"), py::arg("stream") = 0);
  m.def(
      "sophia_curvature",
      [](const Numbers& numbers, const List& hessians, const List& us, const List& ws, double beta2,
         std::uintptr_t stream) {
        Borrowed b("sophia_curvature");
        TensorLists lists(b, numbers);
        std::vector<hrmcore::CurvatureTensors> tensors(lists.count());
        for (std::size_t i = 0; i < tensors.size(); ++i) {
          tensors[i] = {lists.at(hessians, i, "hessian"), lists.at(us, i, "u"), lists.at(ws, i, "w"),
                        lists.number(i)};
        }
        const hrmcore::SophiaCurvature args{tensors.data(), static_cast<std::int64_t>(tensors.size()), beta2};
        run(b, stream, args, hrmcore::sophia_curvature);
      },
      py::arg("numbers"), py::arg("hessians"), py::arg("us"), py::arg("ws"), py::arg("beta2"),
      py::arg("stream") = 0);
  const auto bind_adam = [&m](const char* op, void (*kernel)(const hrmcore::AdamStep&) noexcept) {
    m.def(
        op,
        [op, kernel](const Numbers& numbers, const List& params, const List& grads, const List& exp_avgs,
                     const List& exp_avg_sqs, const List& emas, const Numbers& steps, double lr, double beta1,
                     double beta2, double weight_decay, double eps, double ema_decay, std::uintptr_t stream) {
          Borrowed b(op);
          TensorLists lists(b, numbers);
          auto tensors = step_tensors(lists, params, grads, exp_avgs, exp_avg_sqs, "exp_avg_sq", emas);
          if (steps.size() != tensors.size()) {
            hrmcore::reject(op, "steps", "a list of " + std::to_string(tensors.size()),
                            std::to_string(steps.size()));
          }
          for (std::size_t i = 0; i < tensors.size(); ++i) tensors[i].step = steps[i];
          const auto count = static_cast<std::int64_t>(tensors.size());
          run(b, stream,
              hrmcore::AdamStep{tensors.data(), count, lr, beta1, beta2, weight_decay, eps, ema_decay},
              kernel);
        },
        py::arg("numbers"), py::arg("params"), py::arg("grads"), py::arg("exp_avgs"), py::arg("exp_avg_sqs"),
        py::arg("emas"), py::arg("steps"), py::arg("lr"), py::arg("beta1"), py::arg("beta2"),
        py::arg("weight_decay"), py::arg("eps"), py::arg("ema_decay"), py::arg("stream") = 0);
  };
  bind_adam("adamw_step", hrmcore::adamw_step);
  bind_adam("adam_atan2_step", hrmcore::adam_atan2_step);
}

void bind_rms_norm(py::module_& m) {
  m.def(
      "rms_norm_forward",
      [](const py::object& x, const py::object& residual, const py::object& y, const py::object& sum,
         double eps, std::uintptr_t stream) {
        Borrowed b("rms_norm_forward");
        const hrmcore::RmsNormForward args{b.view(x, "x"), b.optional(residual, "residual"), b.view(y, "y"),
                                           b.optional(sum, "sum"), eps};
        run(b, stream, args, hrmcore::rms_norm_forward);
      },
      py::arg("x"), py::arg("residual"), py::arg("y"), py::arg("sum"), py::arg("eps"), py::arg("stream") = 0);
  m.def(
      "rms_norm_backward",
      [](const py::object& u, const py::object& grad_y, const py::object& grad_sum, const py::object& grad_u,
         double eps, std::uintptr_t stream) {
        Borrowed b("rms_norm_backward");
        const hrmcore::RmsNormBackward args{b.view(u, "u"), b.view(grad_y, "grad_y"),
                                            b.optional(grad_sum, "grad_sum"), b.view(grad_u, "grad_u"), eps};
        run(b, stream, args, hrmcore::rms_norm_backward);
      },
      py::arg("u"), py::arg("grad_y"), py::arg("grad_sum"), py::arg("grad_u"), py::arg("eps"),
      py::arg("stream") = 0);
}

void bind_rope(py::module_& m) {
  m.def(
      "rope",
      [](const py::object& q, const py::object& k, const py::object& table, const py::object& positions,
         const py::object& q_out, const py::object& k_out, bool inverse, std::uintptr_t stream) {
        Borrowed b("rope");
        const hrmcore::Rope args{b.view(q, "q"),
                                 b.view(k, "k"),
                                 b.view(table, "table"),
                                 b.view(positions, "positions"),
                                 b.view(q_out, "q_out"),
                                 b.view(k_out, "k_out"),
                                 inverse};
        run(b, stream, args, hrmcore::rope);
      },
      py::arg("q"), py::arg("k"), py::arg("table"), py::arg("positions"), py::arg("q_out"), py::arg("k_out"),
      py::arg("inverse"), py::arg("stream") = 0);
}

void bind_swiglu(py::module_& m) {
  m.def(
      "swiglu_forward",
      [](const py::object& ab, const py::object& y, std::uintptr_t stream) {
        Borrowed b("swiglu_forward");
        const hrmcore::SwigluForward args{b.view(ab, "ab"), b.view(y, "y")};
        run(b, stream, args, hrmcore::swiglu_forward);
      },
      py::arg("ab"), py::arg("y"), py::arg("stream") = 0);
  m.def(
      "swiglu_backward",
      [](const py::object& ab, const py::object& grad_y, const py::object& grad_ab, std::uintptr_t stream) {
        Borrowed b("swiglu_backward");
        const hrmcore::SwigluBackward args{b.view(ab, "ab"), b.view(grad_y, "grad_y"),
                                           b.view(grad_ab, "grad_ab")};
        run(b, stream, args, hrmcore::swiglu_backward);
      },
      py::arg("ab"), py::arg("grad_y"), py::arg("grad_ab"), py::arg("stream") = 0);
}

void bind_machine_limits(py::module_& m) {
  m.def("stream_read", [](const py::object& source, const py::object& sums) {
    Borrowed b("stream_read");
    run<hrmcore::StreamRead>({b.view(source, "source"), b.view(sums, "sums")}, hrmcore::stream_read);
  });
  m.def("stream_copy", [](const py::object& source, const py::object& target) {
    Borrowed b("stream_copy");
    run<hrmcore::StreamCopy>({b.view(source, "source"), b.view(target, "target")}, hrmcore::stream_copy);
  });
  m.def("multiply_add", [](const py::object& sums, std::int64_t rounds) {
    Borrowed b("multiply_add");
    run<hrmcore::MultiplyAdd>({b.view(sums, "sums"), rounds}, hrmcore::multiply_add);
  });
  m.attr("multiply_add_width") = hrmcore::multiply_add_width;
  m.attr("stream_block") = hrmcore::stream_block;
}

hrmcore::Packing packing_of(const char* argument, const std::string& dtype) {
  using hrmcore::Packing;
  if (dtype == "float32") return Packing::f32;
  if (dtype == "bfloat16") return Packing::bf16;
  if (dtype == "int8") return Packing::int8;
  if (dtype == "int4") return Packing::int4;
  hrmcore::reject("Engine", argument, "float32, bfloat16, int8 or int4", "'" + dtype + "'");
}

// A step waits for the engine without the GIL, so that no thread waits for one of the two holding the other.
std::unique_lock<std::mutex> lock_engine(hrmcore::Engine& engine) {
  py::gil_scoped_release unlocked;
  return std::unique_lock<std::mutex>(engine.mutex());
}

// What may end a long step: a signal's handler that raises, or `stop`, a callable that says true.
class Watch {
 public:
  explicit Watch(const py::object& stop) : stop_(stop) {}

  hrmcore::Interrupt interrupt() {
    return {[](void* self) noexcept { return static_cast<Watch*>(self)->wanted(); }, this};
  }
  void rethrow() const {
    if (error_) std::rethrow_exception(error_);
  }

 private:
  bool wanted() noexcept {
    py::gil_scoped_acquire locked;
    try {
      if (PyErr_CheckSignals() != 0) throw py::error_already_set();
      return !stop_.is_none() && py::cast<bool>(stop_());
    } catch (...) {
      error_ = std::current_exception();
      return true;
    }
  }

  const py::object& stop_;
  std::exception_ptr error_;
};

void bind_engine(py::module_& m) {
  using hrmcore::Engine;
  m.attr("cache_block_tokens") = hrmcore::block_tokens;
  m.def("cache_block_bytes",
        [](const std::string& kv_dtype, std::int64_t slots, std::int64_t heads, std::int64_t head_dim) {
          return hrmcore::CacheShape{packing_of("kv_dtype", kv_dtype), slots, heads, head_dim}.block_bytes();
        });
  py::class_<Engine>(m, "Engine")
      .def(py::init([](std::int64_t vocab_size, std::int64_t hidden_size, std::int64_t intermediate_size,
                       std::int64_t l_layers, std::int64_t h_layers, std::int64_t num_heads,
                       std::int64_t head_dim, std::int64_t h_cycles, std::int64_t l_cycles, double eps,
                       double embedding_scale, const py::object& rope, const std::string& dtype,
                       const std::string& kv_dtype, int threads, std::int64_t cache_tokens,
                       const py::object& rates, std::int64_t window) {
             Borrowed b("Engine");
             const hrmcore::TensorView table = b.view(rope, "rope");
             const std::int64_t positions = table.rank > 0 ? table.shape[0] : 0;
             const hrmcore::ModelShape shape{vocab_size,
                                             hidden_size,
                                             intermediate_size,
                                             l_layers,
                                             h_layers,
                                             num_heads,
                                             head_dim,
                                             h_cycles,
                                             l_cycles,
                                             positions,
                                             static_cast<float>(eps),
                                             static_cast<float>(embedding_scale)};
             return std::make_unique<Engine>(shape, packing_of("dtype", dtype),
                                             packing_of("kv_dtype", kv_dtype), threads, cache_tokens, table,
                                             b.optional(rates, "rates"), window);
           }),
           py::kw_only(), py::arg("vocab_size"), py::arg("hidden_size"), py::arg("intermediate_size"),
           py::arg("L_layers"), py::arg("H_layers"), py::arg("num_heads"), py::arg("head_dim"),
           py::arg("H_cycles"), py::arg("L_cycles"), py::arg("eps"), py::arg("embedding_scale"),
           py::arg("rope"), py::arg("dtype"), py::arg("kv_dtype"), py::arg("threads"),
           py::arg("cache_tokens"), py::arg("rates") = py::none(), py::arg("window") = 0)
      .def("allocate_weights", [](Engine& e) { e.weights().allocate(); })
      .def("map_weights", [](Engine& e, const std::string& path, std::int64_t offset,
                             std::uint64_t checksum) { e.weights().map_file(path, offset, checksum); })
      .def("set_weight",
           [](Engine& e, const std::string& name, const py::object& tensor) {
             Borrowed b("set_weight");
             hrmcore::TensorView view = b.view(tensor, "tensor");
             // numpy has no bfloat16 and brings its bits.
             if (view.dtype == hrmcore::DType::u16) view.dtype = hrmcore::DType::bf16;
             e.weights().set(name, view);
           })
      .def("get_weight",
           [](const Engine& e, const std::string& name, const py::object& out) {
             Borrowed b("get_weight");
             e.weights().get(name, b.view(out, "out"));
           })
      .def("packed_weights",  // borrowed: valid while the engine lives
           [](const Engine& e) {
             return py::memoryview::from_memory(const_cast<const std::byte*>(e.weights().data()),
                                                e.weights().bytes());
           })
      .def("checksum", [](const Engine& e) { return e.weights().checksum(); })
      .def("open",
           [](Engine& e, std::int64_t prefix_length) {
             const auto lock = lock_engine(e);
             return e.open(prefix_length);
           })
      .def("close",
           [](Engine& e, std::int64_t request) {
             const auto lock = lock_engine(e);
             e.close(request);
           })
      .def(
          "step",
          [](Engine& e, const std::vector<std::int64_t>& requests,
             const std::vector<std::vector<std::int64_t>>& ids, const py::object& logits, bool every_row,
             const py::object& stop) {
            Borrowed b("step");
            const hrmcore::TensorView out = b.view(logits, "logits");
            Watch watch(stop);
            const auto lock = lock_engine(e);
            e.begin(requests, ids, every_row, out);
            bool done = false;
            {
              py::gil_scoped_release unlocked;
              done = e.run(watch.interrupt());
            }
            watch.rethrow();
            if (done) e.commit();
            return done;  // or else nothing has happened, because `stop` said so
          },
          py::arg("requests"), py::arg("ids"), py::arg("logits"), py::arg("every_row"),
          py::arg("stop") = py::none())
      .def_property_readonly("vocab_size", [](const Engine& e) { return e.shape().vocabulary; })
      .def_property_readonly("weight_bytes", [](const Engine& e) { return e.weights().bytes(); })
      .def_property_readonly("workspace_bytes", &Engine::workspace_bytes)
      .def_property_readonly("threads", &Engine::threads)
      .def_property_readonly("open_requests", &Engine::open_requests)
      .def_property_readonly("cache_blocks", [](const Engine& e) { return e.cache().capacity(); })
      .def_property_readonly("cache_blocks_used", [](const Engine& e) { return e.cache().used(); });
}

void bind_cuda_step(py::module_& m) {
  m.attr("step_columns") = hrmcore::step_columns;
  m.def("cuda_step_workspace_bytes", &hrmcore::step_workspace_bytes);
  m.def(
      "cuda_step",
      [](const py::object& tokens, const py::object& positions, const py::object& tables,
         const py::object& kv, const py::object& embedding, const py::object& z_init, const py::object& rope,
         const py::object& rates, const py::object& weights, const py::object& logits,
         const py::object& workspace, std::int64_t ffn, std::int64_t fast_layers, std::int64_t slow_layers,
         std::int64_t h_cycles, std::int64_t l_cycles, double eps, double embedding_scale,
         std::int64_t window, const std::string& dtype, bool persistent, std::int64_t blocks,
         std::uintptr_t stream) {
        Borrowed b("cuda_step");
        const hrmcore::CudaStep args{b.view(tokens, "tokens"),
                                     b.view(positions, "positions"),
                                     b.view(tables, "tables"),
                                     b.view(kv, "kv"),
                                     b.view(embedding, "embedding"),
                                     b.view(z_init, "z_init"),
                                     b.view(rope, "rope"),
                                     b.optional(rates, "rates"),
                                     b.view(weights, "weights"),
                                     b.view(logits, "logits"),
                                     b.view(workspace, "workspace"),
                                     ffn,
                                     fast_layers,
                                     slow_layers,
                                     h_cycles,
                                     l_cycles,
                                     eps,
                                     embedding_scale,
                                     window,
                                     packing_of("dtype", dtype),
                                     persistent,
                                     blocks};
        check(args);
        if (b.device() == hrmcore::Device::cpu && !hrmcore::emulating_cuda()) {
          hrmcore::reject("cuda_step", "tokens", "on a CUDA device", "a tensor on the CPU");
        }
        run_on_cuda(b, stream, args);
      },
      py::kw_only(), py::arg("tokens"), py::arg("positions"), py::arg("tables"), py::arg("kv"),
      py::arg("embedding"), py::arg("z_init"), py::arg("rope"), py::arg("rates"), py::arg("weights"),
      py::arg("logits"), py::arg("workspace"), py::arg("ffn"), py::arg("fast_layers"), py::arg("slow_layers"),
      py::arg("H_cycles"), py::arg("L_cycles"), py::arg("eps"), py::arg("embedding_scale"), py::arg("window"),
      py::arg("dtype"), py::arg("persistent"), py::arg("blocks"), py::arg("stream"));
}

void bind_sampler(py::module_& m) {
  using hrmcore::Sampler;
  m.def("philox4x64", &hrmcore::philox4x64);
  py::class_<Sampler>(m, "Sampler")
      .def(py::init([](double temperature, std::int64_t top_k, double top_p, double min_p,
                       double repetition_penalty, std::uint64_t seed,
                       const std::vector<std::int64_t>& prompt) {
             return std::make_unique<Sampler>(
                 hrmcore::SamplingOptions{temperature, top_k, top_p, min_p, repetition_penalty, seed},
                 prompt);
           }),
           py::kw_only(), py::arg("temperature"), py::arg("top_k"), py::arg("top_p"), py::arg("min_p"),
           py::arg("repetition_penalty"), py::arg("seed"), py::arg("prompt"));
  // The next token of each sampler from its row of logits (S, V); all are counted, or on an error none.
  m.def("sample", [](const std::vector<Sampler*>& samplers, const py::object& logits) {
    Borrowed b("sample");
    const hrmcore::TensorView rows = b.view(logits, "logits");
    const auto count = static_cast<std::int64_t>(samplers.size());
    hrmcore::Check("sample", "logits", rows)
        .cpu()
        .dtype({hrmcore::DType::f32})
        .rank(2)
        .size(0, count, "samplers")
        .contiguous();
    const std::int64_t vocabulary = rows.shape[1];
    if (vocabulary < 1) hrmcore::reject("sample", "logits", "of at least one column", "none");
    bool all_greedy = true;
    for (const Sampler* sampler : samplers) {
      if (sampler == nullptr) hrmcore::reject("sample", "samplers", "samplers", "None");
      all_greedy = all_greedy && sampler->greedy();
    }
    hrmcore::SamplingRoom room(all_greedy ? 0 : vocabulary);
    std::vector<std::int64_t> tokens(samplers.size());
    {
      py::gil_scoped_release unlocked;
      for (std::size_t row = 0; row < tokens.size(); ++row) {
        tokens[row] = samplers[row]->pick(rows.as<float>() + static_cast<std::int64_t>(row) * vocabulary,
                                          vocabulary, room);
      }
    }
    for (std::size_t row = 0; row < tokens.size(); ++row) {
      if (tokens[row] >= 0) continue;
      const std::int64_t token = Sampler::not_finite - tokens[row];
      const float value = rows.as<float>()[static_cast<std::int64_t>(row) * vocabulary + token];
      const std::string message =
          "the model's logits are not finite: " + (value != value ? "nan" : std::to_string(value)) +
          " for token " + std::to_string(token);
      PyErr_SetString(PyExc_ArithmeticError, message.c_str());
      throw py::error_already_set();
    }
    for (std::size_t row = 0; row < tokens.size(); ++row) samplers[row]->accept(tokens[row]);
    return tokens;
  });
}

void bind_runtime(py::module_& m) {
  m.def("isa", [] { return hrmcore::name(hrmcore::current_isa()); });
  m.def("set_isa", &hrmcore::set_isa);
  m.def("supported_isas", [] {
    std::vector<std::string> names;
    for (hrmcore::Isa isa : hrmcore::supported_isas()) names.emplace_back(hrmcore::name(isa));
    return names;
  });
  m.def("emulate_cuda", &hrmcore::emulate_cuda);
  m.def("num_threads", &hrmcore::num_threads);
  m.def("set_num_threads", &hrmcore::set_num_threads);
  if (const char* forced = std::getenv("HRMCORE_ISA"); forced != nullptr && *forced != '\0') {
    try {
      hrmcore::set_isa(forced);
    } catch (const std::invalid_argument& error) {
      throw py::import_error(std::string("the environment variable HRMCORE_ISA is wrong: ") + error.what());
    }
  }
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.doc() = "hrmcore's kernels. Tensors are DLPack producers; outputs are allocated by the caller.";
  bind_runtime(m);
  bind_machine_limits(m);
  bind_attention(m);
  bind_cross_entropy(m);
  bind_cuda_step(m);
  bind_engine(m);
  bind_optim(m);
  bind_rms_norm(m);
  bind_rope(m);
  bind_sampler(m);
  bind_swiglu(m);
}
