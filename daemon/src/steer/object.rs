//! The eBPF object that the build embedded, fitted to the running kernel.
//!
//! aya resolves neither kernel functions nor fields of kernel structures for programs written in Rust, so this puts
//! them in before the object is loaded: ids of functions, offsets of fields, both from the kernel's own BTF. What is to
//! be put where is marked by magic numbers, which `ebpf/src/kernel.rs` emits.
#![forbid(unsafe_code)]

use std::{borrow::Cow, path::Path};

use aya::{
    Btf, Ebpf, EbpfLoader,
    programs::{
        LinkOrder, ProgramError, SchedClassifier, TcAttachType,
        tc::{SchedClassifierLink, TcAttachOptions},
    },
};
use btf_rs::Type;
use object::{Object as _, ObjectSection as _, SectionKind};

use super::{Error, netns::Netns};

/// The object that `build.rs` made from the crate `ebpf/`.
static OBJECT: &[u8] = aya::include_bytes_aligned!(concat!(env!("OUT_DIR"), "/preflightd-ebpf"));

/// The kernel's own types.
pub(super) const BTF: &str = "/sys/kernel/btf/vmlinux";

/// The function without which nothing can be steered (since 6.9).
pub(super) const ASSIGN: &str = "bpf_sk_assign_tcp_reqsk";
/// Functions of the kernel, and a type that one of them is told.
const FUNCTIONS: [(i32, &str); 2] = [(0x4b46_0001, ASSIGN), (0x4b46_0002, "bpf_rdonly_cast")];
const TYPES: [(i32, &str); 1] = [(0x4b46_0101, "tcp_timewait_sock")];

/// A field of a kernel structure.
struct Field {
    magic: i16,
    of: &'static str,
    name: &'static str,
    /// What a kernel without the field is taken to say.
    otherwise: i32,
}

const FIELDS: [Field; 7] = [
    Field { magic: 0x7a01, of: "sock", name: "sk_ack_backlog", otherwise: 0 },
    Field { magic: 0x7a02, of: "sock", name: "sk_max_ack_backlog", otherwise: i32::MAX },
    Field { magic: 0x7a03, of: "tcp_sock", name: "is_mptcp", otherwise: 0 },
    // Without these no TIME_WAIT is taken for one that gives way: see `Fitted::time_wait`.
    Field { magic: 0x7a04, of: "inet_timewait_sock", name: "tw_substate", otherwise: 0 },
    Field { magic: 0x7a05, of: "sock_common", name: "skc_tw_rcv_nxt", otherwise: 0 },
    Field { magic: 0x7a07, of: "tcp_timewait_sock", name: "tw_ts_recent_stamp", otherwise: 0 },
    Field { magic: 0x7a06, of: "tcp_timewait_sock", name: "tw_ts_recent", otherwise: 0 },
];

/// Opcodes of the instruction set (Documentation/bpf/standardization/instruction-set.rst).
const CALL: u8 = 0x85;
const PSEUDO_KFUNC_CALL: u8 = 2;
const LOADS: [u8; 3] = [0x61, 0x71, 0x79];
const MOVE: u8 = 0xb7;

/// The loaded object, and what the kernel has for it.
pub(super) struct Fitted {
    pub(super) ebpf: Ebpf,
    /// Why the program that steers cannot run here.
    pub(super) cannot_steer: Option<Error>,
    /// TIME_WAIT sockets can be read.
    pub(super) time_wait: bool,
}

/// How much fits in the maps that are as large as one wants them.
#[derive(Clone, Copy, Debug)]
pub(super) struct Sizes {
    /// Connections that wait.
    pub(super) pending: u32,
    /// Connections that the program has answered on.
    pub(super) answered: u32,
    /// Labels of routes.
    pub(super) labels: u32,
}

impl Sizes {
    /// Enough to try things out.
    pub(super) const SMALL: Self = Self { pending: 1024, answered: 1024, labels: 64 };
}

/// Loads the maps, and finds out what the kernel can run. `pins`: a directory of bpffs where maps are pinned, or found
/// if they are there already.
pub(super) fn load(pins: Option<&Path>, sizes: Sizes) -> Result<Fitted, Error> {
    fit_and_load(Fit::of_this_kernel(), pins, sizes)
}

fn fit_and_load(fit: Result<Fit, Error>, pins: Option<&Path>, sizes: Sizes) -> Result<Fitted, Error> {
    let mut elf = OBJECT.to_vec();
    let time_wait = fit.as_ref().is_ok_and(|fit| fit.fields[3..].iter().all(Option::is_some));
    let cannot_steer = match fit {
        Ok(fit) => fit.apply(&mut elf).err(),
        // The program that observes has fields in it too, and the verifier would refuse their magic offsets.
        Err(error) => {
            Fit::NOTHING.apply(&mut elf)?;
            Some(error)
        }
    };
    let mut loader = EbpfLoader::new();
    // aya asks for it only to relocate types, which the object does not need; and not every kernel has it.
    let btf = Btf::from_sys_fs().ok();
    loader
        .btf(btf.as_ref())
        .map_max_entries("PENDING", sizes.pending)
        .map_max_entries("ANSWERED", sizes.answered)
        .map_max_entries("OUTCOMES", sizes.labels);
    if let Some(pins) = pins {
        for name in PINNED {
            loader.map_pin_path(name, Cow::Owned(pins.join(name)));
        }
    }
    let ebpf = loader.load(&elf).map_err(Error::new("load the eBPF maps", super::PRIVILEGES))?;
    Ok(Fitted { ebpf, cannot_steer, time_wait })
}

/// The maps that outlive a daemon: all but what belongs to one program alone.
pub(super) const PINNED: &[&str] = &[
    "PORTS",
    "CONFIG",
    "OWNER",
    "HEARTBEAT",
    "KEYS",
    "SERVED",
    "INTERFACES",
    "ROUTES",
    "PENDING",
    "SOCKETS",
    "HOSTS",
    "MARKS",
    "EVENTS",
    "FAIL_OPENS",
    "PORT_COUNTS",
    "SWEPT",
    "ANSWERED",
    "TERMS",
    "TEMPLATES",
    "DATES",
];

/// How much fits in a hash map of connections that is in use, which an earlier daemon may have made.
pub(super) fn entries_of(ebpf: &Ebpf, name: &str) -> Result<u32, Error> {
    let failed = format!("ask for the size of {name}");
    match ebpf.map(name) {
        Some(aya::maps::Map::LruHashMap(map) | aya::maps::Map::HashMap(map)) => {
            Ok(map.info().map_err(Error::new(failed, super::PRIVILEGES))?.max_entries())
        }
        _ => Err(Error::new(failed, "build the daemon anew")("it is no hash map")),
    }
}

/// A program of the object.
pub(super) fn program<'a>(ebpf: &'a mut Ebpf, name: &str) -> &'a mut SchedClassifier {
    let program = ebpf.program_mut(name).expect("the object has this program");
    program.try_into().expect("it is a classifier")
}

/// Has the kernel check and take a program of the object.
pub(super) fn load_program(ebpf: &mut Ebpf, name: &str) -> Result<(), Error> {
    match program(ebpf, name).load() {
        Ok(()) | Err(ProgramError::AlreadyLoaded) => Ok(()),
        Err(error) => Err(Error::new(format!("load the eBPF program `{name}`"), super::PRIVILEGES)(error)),
    }
}

/// The programs that do something, and how many instructions the kernel's verifier went through for each: it gives up at a
/// million.
///
/// # Minimum kernel version
/// 6.9, as for steering.
///
/// # Errors
/// The kernel refuses a map or a program.
pub fn verified_instructions() -> Result<Vec<(&'static str, u32)>, Error> {
    let mut fitted = load(None, Sizes::SMALL)?;
    if let Some(error) = fitted.cannot_steer {
        return Err(error);
    }
    let count = |name| {
        load_program(&mut fitted.ebpf, name)?;
        let failed = Error::new(format!("ask the kernel about the program `{name}`"), super::PRIVILEGES);
        let info = program(&mut fitted.ebpf, name).info().map_err(failed)?;
        let count = info.verified_instruction_count();
        let untold = Error::new("ask how many instructions were verified", "use Linux 5.16 or later");
        count.map(|count| (name, count)).ok_or_else(|| untold("it does not tell"))
    };
    ["steer", "observe", "sweep_pending"].into_iter().map(count).collect()
}

/// The program that does nothing on the ingress of an interface, for as long as this lives: what any program costs.
#[derive(Debug)]
pub struct EmptyProgram {
    _link: SchedClassifierLink,
}

impl EmptyProgram {
    /// Attaches it.
    ///
    /// # Minimum kernel version
    /// 6.6, for TCX.
    ///
    /// # Errors
    /// There is no such interface, or the kernel refuses.
    pub fn attach(netns: &Netns, interface: &str) -> Result<Self, Error> {
        let mut ebpf = load(None, Sizes::SMALL)?.ebpf;
        load_program(&mut ebpf, "empty")?;
        let program = program(&mut ebpf, "empty");
        let attach = || {
            let order = TcAttachOptions::TcxOrder(LinkOrder::first());
            program
                .attach_with_options(interface, TcAttachType::Ingress, order)
                .and_then(|link| program.take_link(link))
        };
        let what = format!("attach to the ingress of {interface}");
        let link = netns.enter(attach)?.map_err(Error::new(what, super::PRIVILEGES))?;
        Ok(Self { _link: link })
    }
}

/// Where the running kernel has what the object asks for.
struct Fit {
    functions: [u32; FUNCTIONS.len()],
    types: [u32; TYPES.len()],
    fields: [Option<u16>; FIELDS.len()],
}

impl Fit {
    /// For a kernel that cannot steer: the program that does is not loaded, the others call nothing and read nothing.
    const NOTHING: Self =
        Self { functions: [0; FUNCTIONS.len()], types: [0; TYPES.len()], fields: [None; FIELDS.len()] };

    fn of_this_kernel() -> Result<Self, Error> {
        let remedy =
            "steering needs Linux 6.9 or later, built with BTF (CONFIG_DEBUG_INFO_BTF); observe instead";
        let types =
            btf_rs::Btf::from_file(BTF).map_err(Error::new(format!("read the types of {BTF}"), remedy))?;
        let find = |what: &str, name: &str, fits: fn(&Type) -> bool| {
            let named = types.resolve_ids_by_name(name).unwrap_or_default();
            let found =
                named.into_iter().find(|id| types.resolve_type_by_id(*id).is_ok_and(|found| fits(&found)));
            found
                .ok_or("there is none")
                .map_err(Error::new(format!("find the kernel's {what} {name}"), remedy))
        };
        let is_function = |found: &Type| matches!(found, Type::Func(_));
        let is_structure = |found: &Type| matches!(found, Type::Struct(_));
        let mut fit = Self::NOTHING;
        for (id, (_, name)) in fit.functions.iter_mut().zip(FUNCTIONS) {
            *id = find("function", name, is_function)?;
        }
        for (id, (_, name)) in fit.types.iter_mut().zip(TYPES) {
            *id = find("structure", name, is_structure)?;
        }
        for (at, field) in fit.fields.iter_mut().zip(&FIELDS) {
            *at = offset(&types, field);
        }
        Ok(fit)
    }

    /// Puts it all in.
    fn apply(&self, elf: &mut [u8]) -> Result<(), Error> {
        let odd = |what: &str| {
            Error::new("fit the eBPF object to this kernel", "build the daemon anew")(what.to_owned())
        };
        let ranges: Vec<_> = {
            let object = object::File::parse(&*elf).map_err(|error| odd(&error.to_string()))?;
            let code = object.sections().filter(|section| section.kind() == SectionKind::Text);
            code.filter_map(|section| section.file_range()).collect()
        };
        for (start, length) in ranges {
            let (start, length) = (start as usize, length as usize);
            for instruction in elf[start..start + length].as_chunks_mut::<8>().0 {
                let [code, registers, low, high, ..] = *instruction;
                let offset = i16::from_le_bytes([low, high]);
                let immediate = i32::from_le_bytes(*instruction.last_chunk().expect("eight bytes"));
                let is_meant = |(magic, _): &(i32, &str)| *magic == immediate;
                if code == CALL && registers >> 4 == PSEUDO_KFUNC_CALL {
                    let Some(index) = FUNCTIONS.iter().position(is_meant) else {
                        return Err(odd("it calls a kernel function that is not known"));
                    };
                    instruction[4..].copy_from_slice(&self.functions[index].to_le_bytes());
                } else if code == MOVE
                    && let Some(index) = TYPES.iter().position(is_meant)
                {
                    instruction[4..].copy_from_slice(&self.types[index].to_le_bytes());
                } else if LOADS.contains(&code)
                    && let Some(index) = FIELDS.iter().position(|field| field.magic == offset)
                {
                    if let Some(offset) = self.fields[index] {
                        instruction[2..4].copy_from_slice(&offset.to_le_bytes());
                    } else {
                        *instruction = [MOVE, registers & 0x0f, 0, 0, 0, 0, 0, 0];
                        instruction[4..].copy_from_slice(&FIELDS[index].otherwise.to_le_bytes());
                    }
                }
            }
        }
        Ok(())
    }
}

/// The offset of a whole field in bytes.
fn offset(types: &btf_rs::Btf, field: &Field) -> Option<u16> {
    let found = types.resolve_types_by_name(field.of).ok()?;
    let of = found.into_iter().find_map(|found| match found {
        Type::Struct(found) => Some(found),
        _ => None,
    })?;
    let bits = bit_offset(types, &of.members, field.name)?;
    // Offsets in instructions are signed, and the magic ones are taken.
    u16::try_from(bits / 8).ok().filter(|offset| bits % 8 == 0 && *offset < 0x7a00)
}

/// The offset of a member that is no bit field, also within members without a name.
fn bit_offset(types: &btf_rs::Btf, members: &[btf_rs::Member], name: &str) -> Option<u32> {
    members.iter().find_map(|member| {
        let found = types.resolve_name(member).ok()?;
        if found == name {
            return member.bitfield_size().is_none_or(|size| size == 0).then(|| member.bit_offset());
        }
        if !found.is_empty() {
            return None;
        }
        match types.resolve_chained_type(member).ok()? {
            Type::Struct(inner) | Type::Union(inner) => {
                Some(member.bit_offset() + bit_offset(types, &inner.members, name)?)
            }
            _ => None,
        }
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Below Linux 6.9, or without BTF.
    #[test]
    fn a_kernel_that_cannot_steer_can_observe() {
        if !super::super::netns::tests::have_root() {
            return;
        }
        let unfit = Err(Error::new("find the function", "observe instead")("there is none"));
        let mut fitted = fit_and_load(unfit, None, Sizes::SMALL).expect("the maps load");
        assert!(fitted.cannot_steer.is_some() && !fitted.time_wait);
        for name in ["observe", "sweep_pending"] {
            load_program(&mut fitted.ebpf, name).unwrap_or_else(|error| panic!("{error}"));
        }
    }

    #[test]
    fn the_object_loads() {
        if !rustix::process::geteuid().is_root() {
            assert!(std::env::var_os("CI").is_none(), "CI must run this test as root");
            eprintln!("skipped: loading an eBPF program needs root");
            return;
        }
        let mut fitted = load(None, Sizes::SMALL).expect("the maps load");
        if let Some(error) = &fitted.cannot_steer {
            panic!("{error}");
        }
        assert!(fitted.time_wait);
        for name in ["observe", "empty", "sweep_pending", "steer"] {
            load_program(&mut fitted.ebpf, name).unwrap_or_else(|error| panic!("{error}"));
            let info = program(&mut fitted.ebpf, name).info().expect("the kernel tells");
            eprintln!("{name}: {:?} instructions verified", info.verified_instruction_count());
        }
    }
}
