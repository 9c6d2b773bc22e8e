// The part of NVRTC that `src/device/cuda/compiler.rs` calls. It compiles nothing: what it makes is the name of what
// was asked for, which the driver beside it takes for a cubin. It looks whether every include is there.
#include <cstdint>
#include <cstring>
#include <set>
#include <string>
#include <vector>

#define NVRTC_API extern "C" __attribute__((visibility("default"))) Result

namespace {

/// nvrtcResult.
enum Result : int { SUCCESS = 0, INVALID_INPUT = 3, INVALID_PROGRAM = 4, INVALID_OPTION = 5, COMPILATION = 6 };

struct Program {
    std::vector<std::string> texts;  // the main one first
    std::set<std::string> headers;
    std::string log;
    std::string cubin;
};

constexpr const char* TARGETS[] = {"sm_90", "sm_90a", "sm_100", "sm_100a", "sm_103", "sm_120", "sm_120a", "sm_121"};
constexpr char ARCHITECTURE[] = "--gpu-architecture=";

/// Names that `text` includes with quotes and that no header has.
std::string missing(const Program& program, const std::string& text) {
    std::string found;
    const std::string include = "#include \"";
    for (size_t at = text.find(include); at != std::string::npos; at = text.find(include, at)) {
        at += include.size();
        std::string name = text.substr(at, text.find('"', at) - at);
        // What other compilers take instead of PTX.
        if (name != "shim/ptx.hpp" && !program.headers.contains(name))
            found += "cannot open source file \"" + name + "\"\n";
    }
    return found;
}

}  // namespace

/// No NVRTC has this version, so that what is kept of this one is never taken for another's.
NVRTC_API nvrtcVersion(int* major, int* minor) {
    *major = 0;
    *minor = 1;
    return SUCCESS;
}

extern "C" __attribute__((visibility("default"))) const char* nvrtcGetErrorString(Result result) {
    switch (result) {
        case SUCCESS: return "NVRTC_SUCCESS";
        case INVALID_INPUT: return "NVRTC_ERROR_INVALID_INPUT";
        case INVALID_PROGRAM: return "NVRTC_ERROR_INVALID_PROGRAM";
        case INVALID_OPTION: return "NVRTC_ERROR_INVALID_OPTION";
        case COMPILATION: return "NVRTC_ERROR_COMPILATION";
    }
    return "NVRTC_ERROR unknown";
}

NVRTC_API nvrtcCreateProgram(Program** program, const char* source, const char*, int count, const char* const* headers,
                             const char* const* names) {
    if (!program || !source || count < 0) return INVALID_INPUT;
    auto* made = new Program;
    made->texts.emplace_back(source);
    for (int i = 0; i < count; ++i) {
        made->texts.emplace_back(headers[i]);
        made->headers.emplace(names[i]);
    }
    *program = made;
    return SUCCESS;
}

NVRTC_API nvrtcDestroyProgram(Program** program) {
    if (!program || !*program) return INVALID_PROGRAM;
    delete *program;
    *program = nullptr;
    return SUCCESS;
}

NVRTC_API nvrtcCompileProgram(Program* program, int count, const char* const* options) {
    if (!program) return INVALID_PROGRAM;
    std::string target;
    for (int i = 0; i < count; ++i) {
        if (std::strncmp(options[i], ARCHITECTURE, sizeof ARCHITECTURE - 1) == 0)
            target = options[i] + sizeof ARCHITECTURE - 1;
        else if (std::strcmp(options[i], "--std=c++20") != 0)
            return INVALID_OPTION;
    }
    bool known = false;
    for (const char* name : TARGETS) known |= target == name;
    if (!known) {
        program->log = "nvrtc: error: invalid value for --gpu-architecture (-arch)\n";
        return INVALID_OPTION;
    }
    for (const std::string& text : program->texts) program->log += missing(*program, text);
    if (!program->log.empty()) return COMPILATION;
    program->cubin = "\x7f" "ELF of the CPU shim for " + target;
    return SUCCESS;
}

NVRTC_API nvrtcGetProgramLogSize(Program* program, size_t* bytes) {
    *bytes = program->log.size() + 1;
    return SUCCESS;
}

NVRTC_API nvrtcGetProgramLog(Program* program, char* log) {
    std::memcpy(log, program->log.c_str(), program->log.size() + 1);
    return SUCCESS;
}

NVRTC_API nvrtcGetCUBINSize(Program* program, size_t* bytes) {
    *bytes = program->cubin.size();
    return SUCCESS;
}

NVRTC_API nvrtcGetCUBIN(Program* program, char* cubin) {
    std::memcpy(cubin, program->cubin.data(), program->cubin.size());
    return SUCCESS;
}
