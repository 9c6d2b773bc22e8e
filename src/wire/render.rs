//! Renders what kernels must agree on into `kernels/generated/wire.cuh`: every struct with its size and offsets
//! asserted, every constant with its value. [`device_struct!`] declares a struct for both sides.

use std::fmt::Write;

/// The C++ spelling of a field's type.
pub trait DeviceType {
    /// What stands before the field's name.
    const NAME: &'static str;

    /// What stands after it.
    fn suffix() -> String {
        String::new()
    }
}

impl DeviceType for u32 {
    const NAME: &'static str = "u32";
}

impl DeviceType for i32 {
    const NAME: &'static str = "i32";
}

impl DeviceType for u64 {
    const NAME: &'static str = "u64";
}

impl<T: DeviceType, const N: usize> DeviceType for [T; N] {
    const NAME: &'static str = T::NAME;

    fn suffix() -> String {
        format!("[{N}]{}", T::suffix())
    }
}

/// One field of a struct for both sides.
pub struct Field {
    /// Its documentation.
    pub doc: &'static str,
    /// Its name.
    pub name: &'static str,
    /// Its type, before the name.
    pub prefix: &'static str,
    /// Its type, after the name.
    pub suffix: String,
    /// Its offset in bytes.
    pub offset: usize,
}

/// A struct for both sides.
pub trait DeviceStruct: Sized {
    /// Its name.
    const NAME: &'static str;
    /// Its documentation.
    const DOC: &'static str;

    /// Its fields in order.
    fn fields() -> Vec<Field>;

    /// Its declaration in C++, with the layout asserted.
    fn declaration() -> String {
        let (name, fields) = (Self::NAME, Self::fields());
        let mut text = String::new();
        comment(&mut text, "", Self::DOC);
        let _ = writeln!(text, "struct {name} {{");
        for Field { doc, name, prefix, suffix, .. } in &fields {
            comment(&mut text, "    ", doc);
            let _ = writeln!(text, "    {prefix} {name}{suffix};");
        }
        let _ = writeln!(text, "}};\nstatic_assert(sizeof({name}) == {}, \"{name}\");", size_of::<Self>());
        for field in &fields {
            let (field, offset) = (field.name, field.offset);
            let _ = writeln!(text, "static_assert(OFFSET_OF({name}, {field}) == {offset}, \"{name}\");");
        }
        text
    }
}

/// `doc` as comment lines.
pub fn comment(text: &mut String, indent: &str, doc: &str) {
    for line in doc.lines() {
        let _ = writeln!(text, "{}", format!("{indent}///{line}").trim_end());
    }
}

/// Declares a `repr(C)` struct that kernels share.
macro_rules! device_struct {
    ($(#[doc = $doc:literal])* $name:ident { $($(#[doc = $field_doc:literal])* $vis:vis $field:ident: $ty:ty,)* }) => {
        $(#[doc = $doc])*
        #[repr(C)]
        #[derive(Debug, Clone, Copy, PartialEq, Eq, bytemuck::Pod, bytemuck::Zeroable)]
        pub struct $name {
            $($(#[doc = $field_doc])* $vis $field: $ty,)*
        }

        impl $crate::wire::render::DeviceType for $name {
            const NAME: &'static str = stringify!($name);
        }

        impl $crate::wire::render::DeviceStruct for $name {
            const NAME: &'static str = stringify!($name);
            const DOC: &'static str = concat!($($doc, "\n"),*);

            fn fields() -> Vec<$crate::wire::render::Field> {
                vec![$($crate::wire::render::Field {
                    doc: concat!($($field_doc, "\n"),*),
                    name: stringify!($field),
                    prefix: <$ty as $crate::wire::render::DeviceType>::NAME,
                    suffix: <$ty as $crate::wire::render::DeviceType>::suffix(),
                    offset: std::mem::offset_of!($name, $field),
                }),*]
            }
        }
    };
}

/// Declares `u32` codes that kernels share, in a module of their own.
macro_rules! device_codes {
    ($(#[doc = $doc:literal])* $name:ident { $($(#[doc = $code_doc:literal])* $code:ident = $value:expr,)* }) => {
        $(#[doc = $doc])*
        pub mod $name {
            $($(#[doc = $code_doc])* pub const $code: u32 = $value;)*

            /// The declaration in C++.
            pub(in $crate::wire) fn declaration() -> String {
                let mut text = String::new();
                $crate::wire::render::comment(&mut text, "", concat!($($doc, "\n"),*));
                text += concat!("namespace ", stringify!($name), " {\n");
                $(
                    $crate::wire::render::comment(&mut text, "", concat!($($code_doc, "\n"),*));
                    text += &format!("constexpr u32 {} = {};\n", stringify!($code), $code);
                )*
                text + "}\n"
            }
        }
    };
}

pub(crate) use {device_codes, device_struct};
