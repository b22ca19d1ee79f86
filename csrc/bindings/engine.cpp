// The engine, the decode step on CUDA and the sampler in Python.
#include <array>
#include <chrono>
#include <cstdint>
#include <exception>
#include <memory>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "bindings/bindings.h"
#include "bindings/fields.h"
#include "core/philox.h"
#include "decode/decode_step.h"
#include "decode/packed_product.h"
#include "decode/rotate_append.h"
#include "decode/sampling.h"
#include "engine/engine.h"
#include "engine/prefetch_trial.h"
#include "engine/sampler.h"

namespace hrmcore::python {
namespace {

using Tensor = Operand<Use::input>;
using OptionalTensor = Operand<Use::optional>;
using Output = Operand<Use::output>;

// What may end a long step, or the wait for one: a signal's handler that raises, or `stop`, a callable that
// says true. Whatever Python runs here holds none of the core's locks.
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

// Waits without the GIL; false when it is not to wait any longer.
bool take_turn(std::optional<Engine::Turn>& turn, Engine& engine, CancelCheck& cancel) {
  {
    py::gil_scoped_release unlocked;
    turn.emplace(engine, cancel.interrupt());
  }
  cancel.rethrow();
  return turn->taken();
}

Recurrence::Ended run_step(Engine::Step& step, const TensorView& logits, std::int64_t tokens,
                           CancelCheck& cancel) {
  Recurrence::Ended ended{};
  {
    py::gil_scoped_release unlocked;
    ended = step.run(logits, tokens, cancel.interrupt());
  }
  cancel.rethrow();
  if (ended == Recurrence::Ended::done) step.commit();
  return ended;
}

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
  m.def(
      "page_bytes",
      [](const std::string& kv_dtype, std::int64_t slots, std::int64_t heads, std::int64_t head_dim) {
        return CacheShape{packing_of("Engine", "kv_dtype", kv_dtype), slots, heads, head_dim}.page_bytes();
      },
      py::arg("kv_dtype"), py::arg("slots"), py::arg("heads"), py::arg("head_dim"));
  py::class_<PrefetchTrial>(m, "PrefetchTrial")  // for its test
      .def(py::init())
      .def("begin", &PrefetchTrial::begin, py::arg("tokens"))
      .def(
          "end",
          [](PrefetchTrial& trial, std::int64_t nanoseconds) {
            trial.end(std::chrono::nanoseconds(nanoseconds));
          },
          py::arg("nanoseconds"))
      .def_property_readonly("decided", &PrefetchTrial::decided);
  py::class_<Engine::Step>(m, "Step")
      .def(
          "run",  // whether it is done; None when `stop` said so
          [](Engine::Step& step, const Output& logits, std::int64_t tokens,
             const py::object& stop) -> std::optional<bool> {
            DlpackArgs b("run");
            const TensorView out = b.view(logits, "logits");
            if (tokens < 1) reject("run", "tokens", "at least 1", std::to_string(tokens));
            CancelCheck cancel(stop);
            std::optional<Engine::Turn> turn;
            if (!take_turn(turn, step.engine(), cancel)) return std::nullopt;
            step.check(out);
            const Recurrence::Ended ended = run_step(step, out, tokens, cancel);
            if (ended == Recurrence::Ended::stopped) return std::nullopt;
            return ended == Recurrence::Ended::done;
          },
          py::arg("logits"), py::arg("tokens"), py::arg("stop") = py::none())
      .def_property_readonly("tokens", &Engine::Step::tokens)
      .def_property_readonly("halves", &Engine::Step::halves)
      .def_property_readonly("halves_done", &Engine::Step::halves_done);
  py::class_<Engine>(m, "Engine")
      .def(py::init([](std::int64_t vocab_size, std::int64_t hidden_size, std::int64_t intermediate_size,
                       std::int64_t l_layers, std::int64_t h_layers, std::int64_t num_heads,
                       std::int64_t head_dim, std::int64_t h_cycles, std::int64_t l_cycles, double eps,
                       double embedding_scale, const Tensor& rope, const std::string& dtype,
                       const std::string& kv_dtype, int threads, std::int64_t cache_tokens,
                       const OptionalTensor& log_decay, std::int64_t window) {
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
             return std::make_unique<Engine>(shape, packing_of("Engine", "dtype", dtype),
                                             packing_of("Engine", "kv_dtype", kv_dtype), threads,
                                             cache_tokens, table, b.optional(log_decay, "log_decay"), window);
           }),
           py::kw_only(), py::arg("vocab_size"), py::arg("hidden_size"), py::arg("intermediate_size"),
           py::arg("L_layers"), py::arg("H_layers"), py::arg("num_heads"), py::arg("head_dim"),
           py::arg("H_cycles"), py::arg("L_cycles"), py::arg("eps"), py::arg("embedding_scale"),
           py::arg("rope"), py::arg("dtype"), py::arg("kv_dtype"), py::arg("threads"),
           py::arg("cache_tokens"), py::arg("log_decay") = py::none(), py::arg("window") = 0)
      .def("allocate_weights", [](Engine& e) { e.weights().allocate(); })
      .def(
          "map_weights",
          [](Engine& e, const std::string& path, std::int64_t offset, std::uint64_t checksum) {
            e.weights().map_file(path, offset, checksum);
          },
          py::arg("path"), py::arg("offset"), py::arg("checksum"))
      .def(
          "set_weight",
          [](Engine& e, const std::string& name, const Tensor& tensor) {
            DlpackArgs b("set_weight");
            TensorView view = b.view(tensor, "tensor");
            // numpy has no bfloat16 and brings its bits.
            if (view.dtype == DType::u16) view.dtype = DType::bf16;
            e.weights().set(name, view);
          },
          py::arg("name"), py::arg("tensor"))
      .def(
          "get_weight",
          [](const Engine& e, const std::string& name, const Output& out) {
            DlpackArgs b("get_weight");
            e.weights().get(name, b.view(out, "out"));
          },
          py::arg("name"), py::arg("out"))
      .def("packed_weights",  // borrowed: valid while the engine lives
           [](const Engine& e) {
             return py::memoryview::from_memory(const_cast<const std::byte*>(e.weights().data()),
                                                e.weights().bytes());
           })
      .def("checksum", [](const Engine& e) { return e.weights().checksum(); })
      .def(
          "open", [](Engine& e, std::int64_t prefix_length) { return e.open(prefix_length); },
          py::arg("prefix_length"))
      .def(
          "close", [](Engine& e, std::int64_t request) { e.close(request); }, py::arg("request"))
      .def(
          "step",
          [](Engine& e, const std::vector<std::int64_t>& requests,
             const std::vector<std::vector<std::int64_t>>& ids, const Output& logits, bool every_row,
             const py::object& stop, bool every_layer) {
            DlpackArgs b("step");
            const TensorView out = b.view(logits, "logits");
            CancelCheck cancel(stop);
            std::optional<Engine::Turn> turn;
            if (!take_turn(turn, e, cancel)) return false;
            Engine::Step step(e, requests, ids, every_row, every_layer, false);
            step.check(out);
            // Or else nothing has happened, because `stop` said so.
            return run_step(step, out, step.tokens(), cancel) == Recurrence::Ended::done;
          },
          py::arg("requests"), py::arg("ids"), py::arg("logits"), py::arg("every_row"),
          py::arg("stop") = py::none(), py::arg("every_layer") = false)
      .def(
          "begin",  // a step to be made in slices
          [](Engine& e, const std::vector<std::int64_t>& requests,
             const std::vector<std::vector<std::int64_t>>& ids) {
            return std::make_unique<Engine::Step>(e, requests, ids, false, false, true);
          },
          py::arg("requests"), py::arg("ids"), py::keep_alive<0, 1>())
      .def(
          "keep", [](Engine& e, std::int64_t request) { return e.keep(request); }, py::arg("request"))
      .def(
          "fork",
          [](Engine& e, std::int64_t kept) {
            const py::none never;
            CancelCheck cancel(never);
            std::optional<Engine::Turn> turn;
            take_turn(turn, e, cancel);
            const py::gil_scoped_release unlocked;
            return e.fork(kept);
          },
          py::arg("kept"))
      .def(
          "rewind", [](Engine& e, std::int64_t request, std::int64_t length) { e.rewind(request, length); },
          py::arg("request"), py::arg("length"))
      .def_property_readonly("vocab_size", [](const Engine& e) { return e.shape().vocabulary; })
      .def_property_readonly("weight_bytes", [](const Engine& e) { return e.weights().bytes(); })
      .def_property_readonly("workspace_bytes", &Engine::workspace_bytes)
      .def_property_readonly("threads", &Engine::threads)
      .def_property_readonly("open_requests", &Engine::open_requests)
      .def_property_readonly("cache_pages", &Engine::cache_pages)
      .def_property_readonly("cache_pages_used", &Engine::cache_pages_used);
}

void bind_cuda_step(py::module_& m) {
  m.attr("max_batch") = max_batch;
  m.def("cuda_step_workspace_bytes", &decode_workspace_bytes, py::arg("width"), py::arg("ffn"),
        py::arg("heads"), py::arg("head_dim"));
  // How many requests one step takes on a device, with tables of so many pages; 0 where not one fits.
  m.def(
      "cuda_step_most_requests",
      [](std::int64_t width, std::int64_t ffn, std::int64_t heads, std::int64_t head_dim, bool xpos,
         bool int8_cache, std::int64_t window, std::int64_t table_length, const std::string& dtype,
         std::int64_t blocks, int device) {
        const char* op = "cuda_step_most_requests";
        std::int64_t most = 0;
        const DecodeRoom room{width,    ffn,          heads,
                              head_dim, xpos,         int8_cache,
                              window,   table_length, packing_of(op, "dtype", dtype),
                              blocks,   &most};
        check(room);
        run_on_cuda(op, device, 0, room);
        return most;
      },
      py::kw_only(), py::arg("width"), py::arg("ffn"), py::arg("heads"), py::arg("head_dim"), py::arg("xpos"),
      py::arg("int8_cache"), py::arg("window"), py::arg("table_length"), py::arg("dtype"), py::arg("blocks"),
      py::arg("device") = 0);
  using Step = DecodeStep;
  def_on_cuda<Step>(
      m, "cuda_step", input("tokens", &Step::tokens), input("positions", &Step::positions),
      input("tables", &Step::tables), output("kv", &Step::kv), input("embedding", &Step::embedding),
      input("z_init", &Step::z_init), input("rope", &Step::rope), optional("log_decay", &Step::log_decay),
      input("weights", &Step::weights), output("logits", &Step::logits),
      output("workspace", &Step::workspace), input("ffn", &Step::ffn), input("L_layers", &Step::l_layers),
      input("H_layers", &Step::h_layers), input("H_cycles", &Step::h_cycles),
      input("L_cycles", &Step::l_cycles), input("eps", &Step::eps),
      input("embedding_scale", &Step::embedding_scale), input("window", &Step::window),
      input("dtype", &Step::packing), input("persistent", &Step::persistent), input("blocks", &Step::blocks));
  using Product = PackedProduct;
  def_on_cuda<Product>(m, "cuda_packed_product", input("x", &Product::x), input("weights", &Product::weights),
                       output("out", &Product::out), input("pieces", &Product::pieces),
                       input("gated", &Product::gated), input("dtype", &Product::packing),
                       input("processors", &Product::processors));
  using Append = RotateAppend;
  def_on_cuda<Append>(m, "cuda_rotate_append", input("q", &Append::q), input("k", &Append::k),
                      input("v", &Append::v), input("table", &Append::table),
                      input("positions", &Append::positions), input("rows", &Append::rows),
                      output("q_out", &Append::q_out), output("k_out", &Append::k_out),
                      output("keys", &Append::keys), output("values", &Append::values));
  using Draw = TokenDraw;
  def_on_cuda<Draw>(m, "cuda_draw", input("logits", &Draw::logits), input("fed", &Draw::fed),
                    input("slots", &Draw::slots), output("drawn", &Draw::drawn),
                    output("positions", &Draw::positions), input("options", &Draw::options),
                    output("counts", &Draw::counts), output("seen", &Draw::seen));
}

void bind_sampler(py::module_& m) {
  m.def(
      "philox4x64",
      [](const std::array<std::uint64_t, 4>& counter, const std::array<std::uint64_t, 2>& key) {
        const PhiloxWords words =
            philox4x64({{counter[0], counter[1], counter[2], counter[3]}}, key[0], key[1]);
        return std::vector<std::uint64_t>(words.at, words.at + 4);
      },
      py::arg("counter"), py::arg("key"));
  py::class_<Sampler>(m, "Sampler")
      .def(py::init([](double temperature, std::int64_t top_k, double top_p, double min_p,
                       double repetition_penalty, std::uint64_t seed,
                       const std::vector<std::int64_t>& prompt) {
             return std::make_unique<Sampler>(
                 SamplingOptions{temperature, top_k, top_p, min_p, repetition_penalty, seed}, prompt);
           }),
           py::kw_only(), py::arg("temperature"), py::arg("top_k"), py::arg("top_p"), py::arg("min_p"),
           py::arg("repetition_penalty"), py::arg("seed"), py::arg("prompt"))
      .def(
          "accept", [](Sampler& sampler, std::int64_t token) { sampler.accept(token); }, py::arg("token"))
      .def_property_readonly("draws", &Sampler::draws)
      .def_property_readonly("seen", [](const Sampler& sampler) {
        return std::vector<std::int64_t>(sampler.seen().begin(), sampler.seen().end());
      });
  // Of each row of logits (S, V), its token and the `top` most probable: (token, log probability) each.
  m.def(
      "log_probabilities",
      [](const Tensor& logits, const std::vector<std::int64_t>& tokens,
         const std::vector<std::int64_t>& top) {
        const char* op = "log_probabilities";
        DlpackArgs b(op);
        const TensorView rows = b.view(logits, "logits");
        const auto count = static_cast<std::int64_t>(tokens.size());
        Check(op, "logits", rows).cpu().dtype({DType::f32}).rank(2).size(0, count, "tokens").contiguous();
        if (top.size() != tokens.size())
          reject(op, "top", "as many as tokens, " + std::to_string(count), std::to_string(top.size()));
        const std::int64_t vocabulary = rows.shape[1];
        std::vector<std::vector<std::pair<std::int64_t, double>>> result(tokens.size());
        for (std::size_t row = 0; row < tokens.size(); ++row) {
          if (tokens[row] < 0 || tokens[row] >= vocabulary)
            reject(op, "tokens", "in [0, " + std::to_string(vocabulary) + ")", std::to_string(tokens[row]));
          if (top[row] < 0) reject(op, "top", "at least 0", std::to_string(top[row]));
          const float* logits_row = rows.as<float>() + static_cast<std::int64_t>(row) * vocabulary;
          for (const TokenScore& score : log_probabilities(logits_row, vocabulary, tokens[row], top[row]))
            result[row].emplace_back(score.token, score.logprob);
        }
        return result;
      },
      py::arg("logits"), py::arg("tokens"), py::arg("top"));
  // The next token of each sampler from its row of logits (S, V); all are counted, or on an error none.
  m.def(
      "sample",
      [](const std::vector<Sampler*>& samplers, const Tensor& logits) {
        DlpackArgs b("sample");
        const TensorView rows = b.view(logits, "logits");
        const auto count = static_cast<std::int64_t>(samplers.size());
        Check("sample", "logits", rows)
            .cpu()
            .dtype({DType::f32})
            .rank(2)
            .size(0, count, "samplers")
            .contiguous();
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
      },
      py::arg("samplers"), py::arg("logits"));
}

}  // namespace hrmcore::python
