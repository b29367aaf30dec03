/*
 * A guest that checks all its memory itself: multiboot, 32-bit flat mode, no paging, no interrupts. It
 * runs under TCG and under a KVM that can only emulate non-paged code.
 *
 * It walks the pages FIRST, FIRST + STRIDE, ... below LAST for ever. On each page every STEP bytes
 * there is a word made of (pass, page, place); the guest checks that all of them are of the pass
 * before, writes those of this pass, and looks whether the page behind is still zero (if STRIDE leaves
 * one). Pass and place live in registers only, so they travel as device state: a lost, stale, torn or
 * misplaced page, also a consistently old one, is found at the next visit.
 *
 * On the serial port: "P pass" after each pass, "B page offset found wanted" for each wrong word, and
 * with TIMED=1 per pass a line "L" of "bucket:count" (hex): the first touch of each page timed by TSC,
 * bucket = 8 * floor(log2(ticks)) + the next three bits.
 *
 * Assembled by tests/support/guest_image.py with --defsym FIRST LAST STRIDE STEP TIMED.
 */
	.set PORT, 0x3f8
	.set PASS_MIX, 0x9e3779b1
	.set PAGE_MIX, 0x85ebca6b

	.section .text
	.align 4
	.long 0x1badb002, 0, -0x1badb002

	.globl _start
_start:
	cli
	cld
	movl $stack_top, %esp
	movl $1, %ebx			/* the pass; lives here for ever */
next_pass:
	movl $FIRST, %esi		/* the page; lives here */
next_page:
	.if TIMED
	rdtsc
	movl %eax, %edi
	movl (%esi), %ecx
	rdtsc
	subl %edi, %eax
	call note_ticks
	.endif
	movl %esi, %ecx
	shrl $12, %ecx
	imull $PAGE_MIX, %ecx, %ecx
	imull $PASS_MIX, %ebx, %eax
	xorl %ecx, %eax			/* what is written now */
	leal -1(%ebx), %edx
	imull $PASS_MIX, %edx, %edx
	xorl %ecx, %edx			/* what must be there */
	xorl %edi, %edi
next_word:
	cmpl $1, %ebx
	je write_word			/* nothing is there before the first pass */
	leal (%edx,%edi), %ecx
	cmpl %ecx, (%esi,%edi)
	jne wrong_word
write_word:
	leal (%eax,%edi), %ecx
	movl %ecx, (%esi,%edi)
	addl $STEP, %edi
	cmpl $4096, %edi
	jb next_word
	.if STRIDE > 4096
	movl $4096, %edi
	xorl %ecx, %ecx
	cmpl %ecx, (%esi,%edi)
	jne wrong_zero
	.endif
page_done:
	addl $STRIDE, %esi
	cmpl $LAST, %esi
	jb next_page

	movb $'P', %al
	call put_char
	movl %ebx, %eax
	call put_hex
	call put_end
	.if TIMED
	call put_ticks
	.endif
	incl %ebx
	jmp next_pass

wrong_word:
	call complain
	jmp write_word
wrong_zero:
	call complain
	jmp page_done

/* %ecx wanted at %esi + %edi. Keeps everything. */
complain:
	pushal
	movl %ecx, %ebp
	movb $'B', %al
	call put_char
	movl %esi, %eax
	call put_hex
	movl %edi, %eax
	call put_hex
	movl (%esi,%edi), %eax
	call put_hex
	movl %ebp, %eax
	call put_hex
	call put_end
	incl complaints
	cmpl $1000, complaints
	jae give_up
	popal
	ret
give_up:
	movb $'X', %al
	call put_char
	call put_end
stopped:
	hlt
	jmp stopped

/* " 89abcdef" of %eax. */
put_hex:
	pushal
	movl %eax, %ebx
	movb $' ', %al
	call put_char
	movl $8, %ecx
digit:
	roll $4, %ebx
	movl %ebx, %eax
	andl $15, %eax
	movb digits(%eax), %al
	call put_char
	decl %ecx
	jnz digit
	popal
	ret

put_end:
	movb $'\n', %al
put_char:
	pushl %edx
	pushl %eax
	movl $PORT + 5, %edx
not_yet:
	inb %dx, %al
	testb $0x20, %al
	jz not_yet
	popl %eax
	movl $PORT, %edx
	outb %al, %dx
	popl %edx
	ret

	.if TIMED
note_ticks:
	bsrl %eax, %ecx
	jz ticks_noted
	cmpl $3, %ecx
	jb ticks_noted
	movl %ecx, %edi
	subl $3, %ecx
	shrl %cl, %eax
	andl $7, %eax
	leal (%eax,%edi,8), %eax
	incl buckets(,%eax,4)
ticks_noted:
	ret

/* Those that are not zero, and start anew. */
put_ticks:
	pushal
	movb $'L', %al
	call put_char
	xorl %edi, %edi
bucket:
	movl buckets(,%edi,4), %ebp
	testl %ebp, %ebp
	jz bucket_done
	movl %edi, %eax
	call put_hex
	movb $':', %al
	call put_char
	movl %ebp, %eax
	call put_hex
	movl $0, buckets(,%edi,4)
bucket_done:
	incl %edi
	cmpl $256, %edi
	jb bucket
	call put_end
	popal
	ret
	.endif

	.section .rodata
digits:
	.ascii "0123456789abcdef"

	.section .data
	.align 4096
complaints:
	.long 0
buckets:
	.fill 256, 4, 0
	.fill 1024, 4, 0
stack_top:
