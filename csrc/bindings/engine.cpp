// The engine, the decode step on CUDA and the sampler in Python.
#include <cstdint>
#include <exception>
#include <memory>
#include <mutex>
#include <string>
#include <vector>

#include "bindings/bindings.h"
#include "decode/decode_step.h"
#include "engine/engine.h"
#include "engine/sampler.h"

namespace hrmcore::python {
namespace {

Packing packing_of(const char* argument, const std::string& dtype) {
  if (dtype == "float32") return Packing::f32;
  if (dtype == "bfloat16") return Packing::bf16;
  if (dtype == "int8") return Packing::int8;
  if (dtype == "int4") return Packing::int4;
  reject("Engine", argument, "float32, bfloat16, int8 or int4", "'" + dtype + "'");
}

// A step waits for the engine without the GIL, so that no thread waits for one of the two holding the other.
std::unique_lock<std::mutex> lock_engine(Engine& engine) {
  py::gil_scoped_release unlocked;
  return std::unique_lock<std::mutex>(engine.mutex());
}

// What may end a long step: a signal's handler that raises, or `stop`, a callable that says true.
class CancelCheck {
 public:
  explicit CancelCheck(const py::object& stop) : stop_(stop) {}

  Interrupt interrupt() {
    return {[](void* self) noexcept { return static_cast<CancelCheck*>(self)->wanted(); }, this};
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

}  // namespace

void bind_engine(py::module_& m) {
  py::register_local_exception_translator([](std::exception_ptr thrown) {
    try {
      if (thrown) std::rethrow_exception(thrown);
    } catch (const FileError& error) {
      PyErr_SetString(PyExc_OSError, error.what());
    }
  });
  m.attr("page_tokens") = page_tokens;
  m.def("page_bytes",
        [](const std::string& kv_dtype, std::int64_t slots, std::int64_t heads, std::int64_t head_dim) {
          return CacheShape{packing_of("kv_dtype", kv_dtype), slots, heads, head_dim}.page_bytes();
        });
  py::class_<Engine>(m, "Engine")
      .def(py::init([](std::int64_t vocab_size, std::int64_t hidden_size, std::int64_t intermediate_size,
                       std::int64_t l_layers, std::int64_t h_layers, std::int64_t num_heads,
                       std::int64_t head_dim, std::int64_t h_cycles, std::int64_t l_cycles, double eps,
                       double embedding_scale, const py::object& rope, const std::string& dtype,
                       const std::string& kv_dtype, int threads, std::int64_t cache_tokens,
                       const py::object& log_decay, std::int64_t window) {
             DlpackArgs b("Engine");
             const TensorView table = b.view(rope, "rope");
             const std::int64_t positions = table.rank > 0 ? table.shape[0] : 0;
             const ModelShape shape{vocab_size,
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
                                             b.optional(log_decay, "log_decay"), window);
           }),
           py::kw_only(), py::arg("vocab_size"), py::arg("hidden_size"), py::arg("intermediate_size"),
           py::arg("L_layers"), py::arg("H_layers"), py::arg("num_heads"), py::arg("head_dim"),
           py::arg("H_cycles"), py::arg("L_cycles"), py::arg("eps"), py::arg("embedding_scale"),
           py::arg("rope"), py::arg("dtype"), py::arg("kv_dtype"), py::arg("threads"),
           py::arg("cache_tokens"), py::arg("log_decay") = py::none(), py::arg("window") = 0)
      .def("allocate_weights", [](Engine& e) { e.weights().allocate(); })
      .def("map_weights", [](Engine& e, const std::string& path, std::int64_t offset,
                             std::uint64_t checksum) { e.weights().map_file(path, offset, checksum); })
      .def("set_weight",
           [](Engine& e, const std::string& name, const py::object& tensor) {
             DlpackArgs b("set_weight");
             TensorView view = b.view(tensor, "tensor");
             // numpy has no bfloat16 and brings its bits.
             if (view.dtype == DType::u16) view.dtype = DType::bf16;
             e.weights().set(name, view);
           })
      .def("get_weight",
           [](const Engine& e, const std::string& name, const py::object& out) {
             DlpackArgs b("get_weight");
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
            DlpackArgs b("step");
            const TensorView out = b.view(logits, "logits");
            CancelCheck cancel(stop);
            const auto lock = lock_engine(e);
            e.begin(requests, ids, every_row, out);
            bool done = false;
            {
              py::gil_scoped_release unlocked;
              done = e.run(cancel.interrupt());
            }
            cancel.rethrow();
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
      .def_property_readonly("cache_pages", [](const Engine& e) { return e.cache().capacity(); })
      .def_property_readonly("cache_pages_used", [](const Engine& e) { return e.cache().used(); });
}

void bind_cuda_step(py::module_& m) {
  m.attr("max_batch") = max_batch;
  m.def("cuda_step_workspace_bytes", &decode_workspace_bytes);
  m.def(
      "cuda_step",
      [](const py::object& tokens, const py::object& positions, const py::object& tables,
         const py::object& kv, const py::object& embedding, const py::object& z_init, const py::object& rope,
         const py::object& log_decay, const py::object& weights, const py::object& logits,
         const py::object& workspace, std::int64_t ffn, std::int64_t l_layers, std::int64_t h_layers,
         std::int64_t h_cycles, std::int64_t l_cycles, double eps, double embedding_scale,
         std::int64_t window, const std::string& dtype, bool persistent, std::int64_t blocks,
         std::uintptr_t stream) {
        DlpackArgs b("cuda_step");
        const DecodeStep args{b.view(tokens, "tokens"),
                              b.view(positions, "positions"),
                              b.view(tables, "tables"),
                              b.view(kv, "kv"),
                              b.view(embedding, "embedding"),
                              b.view(z_init, "z_init"),
                              b.view(rope, "rope"),
                              b.optional(log_decay, "log_decay"),
                              b.view(weights, "weights"),
                              b.view(logits, "logits"),
                              b.view(workspace, "workspace"),
                              ffn,
                              l_layers,
                              h_layers,
                              h_cycles,
                              l_cycles,
                              eps,
                              embedding_scale,
                              window,
                              packing_of("dtype", dtype),
                              persistent,
                              blocks};
        check(args);
        if (b.device() == Device::cpu && !emulating_cuda()) {
          reject("cuda_step", "tokens", "on a CUDA device", "a tensor on the CPU");
        }
        run_on_cuda(b, stream, args);
      },
      py::kw_only(), py::arg("tokens"), py::arg("positions"), py::arg("tables"), py::arg("kv"),
      py::arg("embedding"), py::arg("z_init"), py::arg("rope"), py::arg("log_decay"), py::arg("weights"),
      py::arg("logits"), py::arg("workspace"), py::arg("ffn"), py::arg("L_layers"), py::arg("H_layers"),
      py::arg("H_cycles"), py::arg("L_cycles"), py::arg("eps"), py::arg("embedding_scale"), py::arg("window"),
      py::arg("dtype"), py::arg("persistent"), py::arg("blocks"), py::arg("stream"));
}

void bind_sampler(py::module_& m) {
  m.def("philox4x64", &philox4x64);
  py::class_<Sampler>(m, "Sampler")
      .def(py::init([](double temperature, std::int64_t top_k, double top_p, double min_p,
                       double repetition_penalty, std::uint64_t seed,
                       const std::vector<std::int64_t>& prompt) {
             return std::make_unique<Sampler>(
                 SamplingOptions{temperature, top_k, top_p, min_p, repetition_penalty, seed}, prompt);
           }),
           py::kw_only(), py::arg("temperature"), py::arg("top_k"), py::arg("top_p"), py::arg("min_p"),
           py::arg("repetition_penalty"), py::arg("seed"), py::arg("prompt"));
  // The next token of each sampler from its row of logits (S, V); all are counted, or on an error none.
  m.def("sample", [](const std::vector<Sampler*>& samplers, const py::object& logits) {
    DlpackArgs b("sample");
    const TensorView rows = b.view(logits, "logits");
    const auto count = static_cast<std::int64_t>(samplers.size());
    Check("sample", "logits", rows).cpu().dtype({DType::f32}).rank(2).size(0, count, "samplers").contiguous();
    const std::int64_t vocabulary = rows.shape[1];
    if (vocabulary < 1) reject("sample", "logits", "of at least one column", "none");
    bool all_greedy = true;
    for (const Sampler* sampler : samplers) {
      if (sampler == nullptr) reject("sample", "samplers", "samplers", "None");
      all_greedy = all_greedy && sampler->greedy();
    }
    SamplingRoom room(all_greedy ? 0 : vocabulary);
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

}  // namespace hrmcore::python
