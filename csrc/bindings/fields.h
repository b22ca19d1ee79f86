// One table an argument struct: each field's name and its member, stated once. From it come the Python
// function's arguments, the views of the tensors with the names that errors give them, and the types in
// hrmcore/_C.pyi.
#pragma once

#include <cstdint>
#include <stdexcept>
#include <string>
#include <tuple>
#include <type_traits>
#include <vector>

#include "bindings/bindings.h"
#include "gemm/weight_layout.h"

namespace hrmcore::python {

enum class Use : std::uint8_t { input, optional, output, optional_output };

// A Python object that is to be a tensor. Anything is taken, so that DlpackArgs says what is wrong with it.
template <Use use>
class Operand : public py::object {
 public:
  Operand() = default;
  Operand(py::handle h, borrowed_t kind) : py::object(h, kind) {}
  Operand(py::handle h, stolen_t kind) : py::object(h, kind) {}
  static bool check_(py::handle h) { return h.ptr() != nullptr; }
};

// What Python passes for a member.
template <class Member, Use use>
struct PassedAs {
  using type = Member;
};
template <Use use>
struct PassedAs<TensorView, use> {
  using type = Operand<use>;
};
template <Use use>
struct PassedAs<Packing, use> {
  using type = std::string;
};

template <class Args, class Member, Use use>
struct Field {
  using Passed = typename PassedAs<Member, use>::type;
  const char* name;
  Member Args::* member;
};

template <class Args, class Member>
constexpr Field<Args, Member, Use::input> input(const char* name, Member Args::* member) {
  return {name, member};
}
template <class Args>
constexpr Field<Args, TensorView, Use::optional> optional(const char* name, TensorView Args::* member) {
  return {name, member};
}
template <class Args>
constexpr Field<Args, TensorView, Use::output> output(const char* name, TensorView Args::* member) {
  return {name, member};
}
template <class Args>
constexpr Field<Args, TensorView, Use::optional_output> optional_output(const char* name,
                                                                        TensorView Args::* member) {
  return {name, member};
}

// A list with one entry a parameter, for an optimizer; `entry` is what errors call one of them.
template <class Entry, class Member>
struct ListField {
  using Passed = std::vector<typename PassedAs<Member, Use::optional>::type>;
  const char* name;
  const char* entry;
  Member Entry::* member;
};

template <class Entry, class Member>
constexpr ListField<Entry, Member> list(const char* name, const char* entry, Member Entry::* member) {
  return {name, entry, member};
}

inline Packing packing_of(const char* op, const char* argument, const std::string& dtype) {
  if (dtype == "float32") return Packing::f32;
  if (dtype == "bfloat16") return Packing::bf16;
  if (dtype == "int8") return Packing::int8;
  if (dtype == "int4") return Packing::int4;
  reject(op, argument, "float32, bfloat16, int8 or int4", "'" + dtype + "'");
}

template <class Args, class Member, Use use>
void fill(Args& args, const Field<Args, Member, use>& field,
          const typename Field<Args, Member, use>::Passed& value, DlpackArgs& operands) {
  if constexpr (std::is_same_v<Member, TensorView>) {
    constexpr bool may_be_none = use == Use::optional || use == Use::optional_output;
    args.*field.member =
        may_be_none ? operands.optional(value, field.name) : operands.view(value, field.name);
  } else if constexpr (std::is_same_v<Member, Packing>) {
    args.*field.member = packing_of(operands.op(), field.name, value);
  } else {
    args.*field.member = value;
  }
}
template <class Args, class Entry, class Member>
void fill(Args&, const ListField<Entry, Member>&, const typename ListField<Entry, Member>::Passed&,
          DlpackArgs&) {}

template <class Entry, class Member>
void fill_entry(std::vector<Entry>& entries, std::size_t i, const ListField<Entry, Member>& field,
                const typename ListField<Entry, Member>::Passed& values, DlpackArgs& operands) {
  if (values.size() != entries.size()) {
    reject(operands.op(), field.entry, "a list of " + std::to_string(entries.size()),
           std::to_string(values.size()));
  }
  if constexpr (std::is_same_v<Member, TensorView>) {
    try {
      entries[i].*field.member = operands.optional(values[i], field.entry);
    } catch (const std::invalid_argument& error) {
      throw std::invalid_argument("parameter " + std::to_string(entries[i].number) + ": " + error.what());
    }
  } else {
    entries[i].*field.member = values[i];
  }
}
template <class Entry, class Args, class Member, Use use>
void fill_entry(std::vector<Entry>&, std::size_t, const Field<Args, Member, use>&,
                const typename Field<Args, Member, use>::Passed&, DlpackArgs&) {}

template <class Args>
using Kernel = void (*)(const Args&) noexcept;

// The Python function `op` of an op with CUDA kernels: an argument a field, then the stream.
template <class Args, class... Fields>
void def_op(py::module_& m, const char* op, Kernel<Args> kernel, const Fields&... fields) {
  m.def(
      op,
      [op, kernel, fields...](const typename Fields::Passed&... values, std::uintptr_t stream) {
        DlpackArgs operands(op);
        Args args{};
        (fill(args, fields, values, operands), ...);
        run(operands, stream, args, kernel);
      },
      py::arg(fields.name)..., py::arg("stream") = 0);
}

// The same for a kernel of the CPU alone.
template <class Args, class... Fields>
void def_on_cpu(py::module_& m, const char* op, Kernel<Args> kernel, const Fields&... fields) {
  m.def(
      op,
      [op, kernel, fields...](const typename Fields::Passed&... values) {
        DlpackArgs operands(op);
        Args args{};
        (fill(args, fields, values, operands), ...);
        run(args, kernel);
      },
      py::arg(fields.name)...);
}

// The same for a kernel of CUDA alone, whose arguments Python must name.
template <class Args, class... Fields>
void def_on_cuda(py::module_& m, const char* op, const Fields&... fields) {
  const char* first = std::get<0>(std::tie(fields.name...));
  m.def(
      op,
      [op, first, fields...](const typename Fields::Passed&... values, std::uintptr_t stream) {
        DlpackArgs operands(op);
        Args args{};
        (fill(args, fields, values, operands), ...);
        check(args);
        if (operands.device() == Device::cpu && !emulating_cuda()) {
          reject(op, first, "on a CUDA device", "a tensor on the CPU");
        }
        run_on_cuda(op, operands.device_number(), stream, args);
      },
      py::kw_only(), py::arg(fields.name)..., py::arg("stream"));
}

// The same for an optimizer's step: the numbers of the parameters, which errors name, come before the fields,
// and lists among these have one entry a parameter.
template <class Args, class... Fields>
void def_optimizer(py::module_& m, const char* op, Kernel<Args> kernel, const Fields&... fields) {
  using Entry = std::remove_const_t<std::remove_pointer_t<decltype(Args::tensors)>>;
  m.def(
      op,
      [op, kernel, fields...](const std::vector<std::int64_t>& numbers,
                              const typename Fields::Passed&... values, std::uintptr_t stream) {
        DlpackArgs operands(op);
        std::vector<Entry> entries(numbers.size());
        for (std::size_t i = 0; i < entries.size(); ++i) {
          entries[i].number = numbers[i];
          (fill_entry(entries, i, fields, values, operands), ...);
        }
        Args args{};
        args.tensors = entries.data();
        args.count = static_cast<std::int64_t>(entries.size());
        (fill(args, fields, values, operands), ...);
        run(operands, stream, args, kernel);
      },
      py::arg("numbers"), py::arg(fields.name)..., py::arg("stream") = 0);
}

}  // namespace hrmcore::python

namespace pybind11::detail {

template <>
struct handle_type_name<hrmcore::python::Operand<hrmcore::python::Use::input>> {
  static constexpr auto name = const_name("Tensor");
};
template <>
struct handle_type_name<hrmcore::python::Operand<hrmcore::python::Use::optional>> {
  static constexpr auto name = const_name("Tensor | None");
};
template <>
struct handle_type_name<hrmcore::python::Operand<hrmcore::python::Use::output>> {
  static constexpr auto name = const_name("Output");
};
template <>
struct handle_type_name<hrmcore::python::Operand<hrmcore::python::Use::optional_output>> {
  static constexpr auto name = const_name("Output | None");
};

}  // namespace pybind11::detail
